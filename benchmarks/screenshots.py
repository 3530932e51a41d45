"""The pictures of docs/viewing.md, taken of a finished run of the demo: python screenshots.py RUN."""

from __future__ import annotations

import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tandem.view.export import export
from tandem.view.reading import read_run
from tandem.view.report import report_page

DOCS = Path(__file__).parents[1] / "docs"


def main(run_folder: str) -> None:
    run = read_run(Path(run_folder))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        report, viewer = Path(folder) / "report.html", Path(folder) / "viewer.html"
        report.write_text(report_page(run), encoding="utf-8")
        export(run, viewer)

        page = opened(browser, report, "light", 860)
        keep(page, "viewing-report.png")
        page = opened(browser, viewer, "light", 800)
        open_first(page, "token_td_error")
        press(page, "4", "m")
        keep(page, "viewing-tokens.png")
        page = opened(browser, viewer, "dark", 960)
        open_first(page, "kl")
        press(page, "5", "c")
        keep(page, "viewing-course.png")
        browser.close()


def opened(browser: Browser, path: Path, scheme: Literal["light", "dark"], height: int) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme=scheme)
    page.goto(path.as_uri())
    page.wait_for_selector(".chart path")
    return page


def open_first(page: Page, sort: str) -> None:
    """The first sample after training, in an order that the viewer knows by this name."""
    page.select_option("#file", "heldout_after")
    page.select_option("#sort", sort)
    page.locator(".item").first.click()
    page.wait_for_timeout(500)


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_timeout(500)


def keep(page: Page, name: str) -> None:
    Image.open(BytesIO(page.screenshot())).convert("RGB").save(DOCS / name, optimize=True)
    page.close()


if __name__ == "__main__":
    main(sys.argv[1])
