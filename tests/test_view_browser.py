"""The report and the viewer in a real browser: no errors, every interaction, no harm by what a model wrote."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from made_run import make_run, sample, write_lines
from tandem.view.export import export
from tandem.view.quantities import QUANTITIES
from tandem.view.reading import read_run
from tandem.view.report import write_report
from tandem.view.server import ViewServer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NO_BROWSER = "no Chromium here (Debian: apt-get install chromium; elsewhere: playwright install chromium)"
LONG = "x" * 100_000
HOSTILE = [
    "<script>window.pwned = 'a script'</script>",
    "</script><script>window.pwned = 'an end'</script>",
    "<img src=x onerror=\"window.pwned = 'a handler'\">",
    "<!--<script>",
    "<a href=\"javascript:window.pwned='a link'\">here</a>",
    "\u202eturned\u2066",
    "\0\x07\x1b[31m",
    "\u2028\u2029",
    "\u200b",
    "👩‍👩‍👧‍👦",
    "\ufffd",
    "שלום",
    "\ud800",
    LONG,
    "\r\n\t",
]


def installed_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        path = installed_browser()
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(NO_BROWSER)
        # A container's root has no user namespaces to sandbox with; the pages are this repository's own.
        launched = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser) -> Iterator[playwright.Page]:
    """A page that fails its test for anything that the console complains of, or that asks another machine."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    made = context.new_page()
    made.set_default_timeout(60_000)
    playwright.expect.set_options(timeout=60_000)
    made.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on(
        "request",
        lambda request: (
            None if re.match(r"file:|data:|http://127\.0\.0\.1:", request.url) else complaints.append(request.url)
        ),
    )
    yield made
    pwned = made.evaluate("window.pwned ?? null")
    context.close()
    assert pwned is None
    assert complaints == []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("view") / "ppo")


@pytest.fixture(scope="module")
def exported(run) -> str:
    return export(read_run(run), run.parent / "viewer.html").as_uri()


@pytest.fixture
def serve():
    servers = []

    def start(run: Path) -> str:
        server = ViewServer(read_run(run), 0)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return server.address

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def saved(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts" / f"{name}.jsonl").read_text().splitlines()]


def expect_name(page, name: str | re.Pattern) -> None:
    playwright.expect(page.locator("#sample-name")).to_have_text(name)


# --- every way to open it


def test_the_server_s_page(page, run, serve):
    page.goto(serve(run))
    page.wait_for_selector(".token")
    expect_name(page, "held out, before training, sample 1 of 6")
    assert page.locator("#run-size").inner_text() == "44 samples of 6 steps and evaluations"
    page.click("#report-link")
    page.wait_for_selector(".tile")
    assert page.locator("h1").inner_text().endswith("/ppo")
    page.click("text=Look at every token")
    page.wait_for_selector(".token")


def test_one_exported_page(page, exported):
    page.goto(exported)
    page.wait_for_selector(".token")
    assert page.locator("#report-link").is_hidden()


def test_an_exported_folder_reads_samples_when_they_are_looked_at(page, run, tmp_path):
    page.goto(export(read_run(run), tmp_path / "out").as_uri() + "#file=step_000003&row=2")
    page.wait_for_selector(".token")
    assert page.locator("#prompt").inner_text() == "opening 3 2"
    assert page.evaluate("[...received.keys()]") == ["step_000003"]


def test_a_run_without_samples_says_so(page, tmp_path, serve):
    bare = tmp_path / "sft"
    bare.mkdir()
    (bare / "config.toml").write_text('model = "m"\nsequences_per_minibatch = 8\n')
    (bare / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": null}\n')
    page.goto(serve(bare))
    page.wait_for_selector("text=This run saved no samples")
    page.goto(write_report(bare).as_uri())
    page.wait_for_selector(".chart path", state="attached")


# --- what it shows


def test_a_token_s_exact_numbers_are_shown_on_hover(page, run, exported):
    page.goto(f"{exported}#file=step_000002&row=1")
    row = saved(run, "step_000002")[1]
    page.hover('#tokens [data-token="2"]')
    said = page.locator("#card").inner_text().replace("\u2212", "-").split()
    for name in ("advantages", "values", "rewards"):
        assert f"{row[name][2]:.6f}".rstrip("0") in said
    assert f"{row['logprobs'][2] - row['reference_logprobs'][2]:.6f}".rstrip("0") in said
    page.mouse.move(5, 5)
    assert page.locator("#card").is_hidden()


def test_colours_follow_the_sign_and_the_size(page, run, exported):
    page.goto(f"{exported}#file=step_000002&row=1&by=advantage")
    page.wait_for_selector(".token")
    advantages = saved(run, "step_000002")[1]["advantages"]
    colours = page.eval_on_selector_all(
        "#tokens .token", "all => all.map(t => getComputedStyle(t).backgroundColor.match(/\\d+/g).map(Number))"
    )
    limit = page.evaluate("viewer.quantity.limit")
    for advantage, (red, _, blue) in zip(advantages, colours, strict=True):
        if abs(advantage) > 0.1 * limit:
            assert (blue > red) == (advantage > 0)
    strength = [255 - min(colour) for colour in colours]
    within = [n for n, advantage in enumerate(advantages) if 0 < advantage < limit]
    by_size = sorted(within, key=lambda n: advantages[n])
    assert [strength[n] for n in by_size] == sorted(strength[n] for n in within)


def test_every_quantity_can_be_chosen_by_its_key(page, exported):
    page.goto(exported)
    page.wait_for_selector(".token")
    for number, quantity in enumerate(QUANTITIES, start=1):
        page.keyboard.press(str(number))
        assert page.get_attribute(f'[data-quantity="{quantity.name}"]', "aria-pressed") == "true"
        assert page.locator("#quantities [aria-pressed=true]").count() == 1
        assert quantity.formula in page.locator("#scale").inner_text()
        assert f"by={quantity.name}" in page.url


def test_search_filter_and_sort(page, run, exported):
    page.goto(exported)
    page.wait_for_selector(".item")
    page.keyboard.press("/")
    page.keyboard.type("OPENING 2 5")
    assert page.locator("#count").inner_text() == "1 of 44"
    assert page.locator(".item mark").first.inner_text() == "opening 2 5"
    page.fill("#search", "no such thing")
    assert page.locator(".item").count() == 0
    page.fill("#search", "")
    page.select_option("#file", "step_000004")
    assert page.locator("#count").inner_text() == "8 of 44"
    page.select_option("#sort", "token_advantage")
    largest = max((max(map(abs, row["advantages"])), n) for n, row in enumerate(saved(run, "step_000004")))[1]
    page.locator(".item").first.click()
    expect_name(page, f"step 4, sample {largest + 1} of 8")
    page.select_option("#sort", "score")
    page.locator(".item").first.click()
    best = max((row["score"], n) for n, row in enumerate(saved(run, "step_000004")))[1]
    expect_name(page, f"step 4, sample {best + 1} of 8")


def test_the_keyboard_reaches_everything(page, run, exported):
    page.goto(exported)
    page.wait_for_selector(".token")
    page.keyboard.press("j")
    expect_name(page, re.compile("sample 2 "))
    page.keyboard.press("ArrowUp")
    expect_name(page, re.compile("sample 1 "))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute(".token.current", "data-token") == "1"
    assert page.locator("#card").is_visible()
    assert "token 2" in page.locator("#spoken").inner_text()
    page.keyboard.press("m")
    advantages = saved(run, "heldout_before")[0]["advantages"]
    ranked = sorted(range(len(advantages)), key=lambda n: -abs(advantages[n]))
    assert page.get_attribute(".token.current", "data-token") == str(ranked[0])
    page.keyboard.press("m")
    assert page.get_attribute(".token.current", "data-token") == str(ranked[1])
    page.keyboard.press("]")
    expect_name(page, re.compile("^held out, after"))
    page.keyboard.press("c")
    page.wait_for_selector("#columns .one")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()


def test_the_same_prompt_stands_side_by_side(page, run, exported):
    page.goto(f"{exported}#file=heldout_after&row=3")
    page.click("#across-button")
    page.wait_for_selector("#columns .one")
    assert page.locator("#columns h3").all_inner_texts() == ["held out, before training", "held out, after training"]
    assert page.locator("#columns .one").count() == 4
    expected = [saved(run, name)[n]["response"] for name in ("heldout_before", "heldout_after") for n in (2, 3)]
    assert [text.strip() for text in page.locator("#columns .tokens").all_inner_texts()] == [
        text.strip() for text in expected
    ]
    page.locator("#columns .one button").first.click()
    expect_name(page, "held out, before training, sample 3 of 6")


def test_a_link_leads_to_the_token(page, exported):
    page.goto(f"{exported}#file=step_000003&row=4&by=td_error&token=3")
    page.wait_for_selector(".token.current")
    expect_name(page, "step 3, sample 5 of 8")
    assert page.get_attribute(".token.current", "data-token") == "3"
    page.goto(f"{exported}#file=nonsense&row=-4&by=__proto__&token=x")
    page.wait_for_selector(".token")


def test_curve_and_text_point_at_the_same_token(page, exported):
    page.goto(f"{exported}#file=step_000001&row=0")
    page.hover('#tokens [data-token="1"]')
    assert page.locator("#curve .cursor").count() == 2
    box = page.locator("#curve svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + 40)
    last = page.locator("#tokens .token").count() - 1
    assert page.get_attribute(".token.current", "data-token") == str(last)


def test_ten_thousand_samples_are_a_short_list_of_elements(page, tmp_path, serve):
    big = make_run(tmp_path / "big", samples=2500)
    page.goto(serve(big))
    page.wait_for_selector(".token")
    assert page.locator("#count").inner_text() == "10,012 of 10,012"
    assert page.locator(".item").count() < 60
    page.select_option("#sort", "token_value_error")
    page.fill("#search", "opening 4 24")
    assert page.locator("#count").inner_text() == "111 of 10,012"
    page.fill("#search", "")
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    playwright.expect(page.locator(".item").last).to_have_attribute("aria-posinset", "10012")
    assert page.locator(".item").count() < 60


# --- hostile samples


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A run in which a model wrote all that could do harm, as prompt, response, tokens and reward names."""
    run = make_run(tmp_path / "<b>ppo")
    rng = random.Random(3)
    rows = [
        sample(rng, f"{text} prompt", [text, " and", text], scores={"__proto__": 1.0, text[:50]: 2.0})
        for text in HOSTILE
    ]
    write_lines(run / "rollouts" / "step_000009.jsonl", rows)
    for when in ("before", "after"):
        write_lines(run / "rollouts" / f"heldout_{when}.jsonl", rows)
    finding = {"rule": "x", "title": HOSTILE[0], "first_step": 1, "last_step": 2, "explanation": HOSTILE[2]}
    summary = json.loads((run / "summary.json").read_text()) | {"health": [finding]}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.mark.parametrize("way", ["server", "page", "folder"])
def test_a_hostile_sample_does_nothing(page, hostile, serve, tmp_path, way):
    if way == "server":
        address = serve(hostile)
    else:
        address = export(read_run(hostile), tmp_path / ("v.html" if way == "page" else "v")).as_uri()
    page.goto(address)
    page.wait_for_selector(".token")
    for row, text in enumerate(HOSTILE):
        page.goto(f"{address}#file=step_000009&row={row}&token=0")
        expect_name(page, re.compile(f"sample {row + 1} of"))
        page.wait_for_selector(".token.current")
        assert page.locator("#tokens .token").count() == 3
        assert page.locator("#main script, #main img, #main a, #card img").count() == 0
        assert page.locator("#tokens .token").first.inner_text().strip() != "", repr(text)
    page.click("#across-button")
    page.wait_for_selector("#columns .one")
    page.fill("#search", "<img src=x")
    assert page.locator(".item").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("({}).polluted === undefined && Object.getPrototypeOf({}) === Object.prototype")


def test_a_hostile_report_does_nothing(page, hostile):
    page.goto(write_report(hostile).as_uri())
    page.wait_for_selector(".pair")
    assert page.locator("#main script, #main img").count() == 0
    assert HOSTILE[0] in page.locator("#health").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_characters_that_cannot_be_seen_are_marked(page, hostile, tmp_path):
    address = export(read_run(hostile), tmp_path / "v.html").as_uri()
    expected = {"\u202eturned\u2066": "U+202E", "\0\x07\x1b[31m": "NUL", "\u200b": "U+200B", "\u2028\u2029": "U+2028"}
    for text, mark in expected.items():
        page.goto(f"{address}#file=step_000009&row={HOSTILE.index(text)}&token=0")
        playwright.expect(page.locator("#tokens .mark").first).to_have_text(mark)
    page.goto(f"{address}#file=step_000009&row={HOSTILE.index('👩‍👩‍👧‍👦')}&token=0")
    playwright.expect(page.locator("#tokens .token").first).to_have_text("👩‍👩‍👧‍👦")


def test_a_hundred_thousand_characters(page, tmp_path, serve):
    run = make_run(tmp_path / "ppo")
    rows = [sample(random.Random(4), "long", ["abc", " de"] * 17_000, returns=[], rewards=[0.0] * 34_000)]
    write_lines(run / "rollouts" / "step_000009.jsonl", rows)
    page.goto(f"{serve(run)}#file=step_000009&row=0")
    page.wait_for_selector("#more:visible")
    assert page.locator("#more").inner_text() == "Show the other 14,000 tokens"
    assert page.evaluate("document.querySelectorAll('#tokens .token').length") == 20_000


# --- for every eye


def linear(colour: list[float]) -> list[float]:
    parts = [part / 255 for part in colour]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def luminance(colour: list[float]) -> float:
    r, g, b = linear(colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def oklab_lightness(colour: list[float]) -> float:
    """Ottosson 2020."""
    r, g, b = linear(colour)
    cones = (
        0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
        0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
        0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
    )
    return sum(
        weight * cone ** (1 / 3) for weight, cone in zip((0.2104542553, 0.793617785, -0.0040720468), cones, strict=True)
    )


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(text: str) -> list[float]:
    return [float(part) for part in re.findall(r"[\d.]+", text)[:3]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_its_contrast_on_every_colour(page, exported, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(exported)
    page.wait_for_selector(".token")
    ink = rgb(page.evaluate("getComputedStyle(document.querySelector('#tokens')).color"))
    surface = rgb(page.evaluate("getComputedStyle(document.querySelector('#text')).backgroundColor"))
    colours = [
        rgb(text) for text in page.evaluate("(c => Array.from({length: 41}, (_, n) => c(n / 20 - 1)))(palette())")
    ]
    assert min(contrast(ink, colour) for colour in colours) >= 4.5
    assert colours[20] == pytest.approx(surface, abs=1)
    assert contrast(rgb(page.evaluate("getComputedStyle(document.querySelector('#prompt')).color")), surface) >= 4.5
    for end in (colours[0], colours[-1]):
        assert contrast(end, surface) >= 1.5


def test_colours_come_in_even_steps_and_are_told_apart_without_red_or_green(page, exported):
    """Machado et al. 2009, full protanopia and deuteranopia, on linear RGB."""
    page.goto(exported)
    page.wait_for_selector(".token")
    deficiencies = {
        "protan": [(0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)],
        "deutan": [(0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)],
    }
    for theme in ("light", "dark"):
        page.evaluate(f"theme.use('{theme}')")
        ends = [rgb(text) for text in page.evaluate("[palette()(-0.6), palette()(0.6)]")]
        for matrix in deficiencies.values():
            seen = []
            for end in ends:
                seen.append([sum(a * b for a, b in zip(row, linear(end), strict=True)) for row in matrix])
            # Blueness against yellowness is what these eyes see best.
            assert (seen[1][2] - seen[1][0]) - (seen[0][2] - seen[0][0]) > 0.15 * (1 if theme == "light" else 0.5)
        shares = page.evaluate("[0, 0.25, 0.5, 0.75, 1].map(palette())")
        lightness = [oklab_lightness(rgb(colour)) for colour in shares]
        steps = [b - a for a, b in itertools.pairwise(lightness)]
        assert max(steps) - min(steps) < 0.02


def test_the_theme_can_be_chosen(page, exported):
    page.goto(exported)
    page.wait_for_selector(".token")
    page.emulate_media(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert luminance(rgb(dark)) < 0.05 < 0.7 < luminance(rgb(light))
    page.click(".theme")
    assert page.evaluate(background) == light
    assert page.locator(".theme").inner_text() == "Theme: light"


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_is_wider_than_the_window(page, run, exported, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(exported)
    page.wait_for_selector(".token")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.goto(write_report(run).as_uri())
    page.wait_for_selector(".chart path")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# --- the report


def test_the_report_s_curves_are_read_together(page, run):
    page.goto(write_report(run).as_uri())
    page.wait_for_selector(".chart path")
    box = page.locator(".chart svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + 40)
    cursors = page.locator(".cursor").count()
    assert cursors >= 5
    assert "step 4" in page.locator(".legend").first.inner_text()
    page.mouse.move(5, 5)
    assert page.locator(".cursor").count() == 0


def test_the_report_explains_its_curves(page, run):
    page.goto(write_report(run).as_uri())
    page.locator("section").get_by_text("Explained variance", exact=True).last.focus()
    assert "a constant would be the better baseline" in page.locator("#card").inner_text()


def test_a_gap_in_a_metric_is_a_gap_in_its_curve(page, run):
    page.goto(write_report(run).as_uri())
    chart = page.locator(".surface", has=page.locator("h3", has_text=re.compile("^Explained variance$"))).last
    path = chart.locator("path").first.get_attribute("d")
    assert path.count("M") == 2


def test_the_critic_s_moments_can_be_chosen(page, run):
    page.goto(write_report(run).as_uri())
    slider = page.locator(".slider input")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator(".slider output").inner_text() == "step 1"
    page.keyboard.press("End")
    assert page.locator(".slider output").inner_text() == "step 4"


# --- a pipeline


def make_pipeline(path: Path, texts: list[str]) -> Path:
    """Two stages, of which the second was not begun since a check did not hold, and answers to read."""
    (path / "sft").mkdir(parents=True)
    (path / "run.json").write_text('{"stage": "pipeline"}')
    (path / "config.toml").write_text('model = "m"\n[sft.data]\ntrain = "s.jsonl"\n[dpo.data]\ntrain = "p.jsonl"\n')
    (path / "sft" / "config.toml").write_text('model = "m"\nsequences_per_minibatch = 8\n')
    (path / "sft" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    sft = {"stage": "sft", "interrupted": False, "seconds": 3.0, "heldout": {"after": {"heldout/loss": 1.5}}}
    (path / "sft" / "summary.json").write_text(json.dumps(sft))
    write_report(path / "sft")
    checks = [{"where": "base -> sft", "name": text, "held": None, "said": text, "remedy": ""} for text in texts]
    checks.append({"where": "sft", "name": "held-out loss", "held": False, "said": "it rose", "remedy": "lower the lr"})
    answers = [{"prompt": text, "answers": {"base": text, "sft": text}} for text in texts]
    summary = {"stage": "pipeline", "interrupted": True, "handovers": checks, "answers": answers}
    (path / "summary.json").write_text(json.dumps(summary))
    return write_report(path)


def test_a_pipeline_s_report_leads_to_its_stages(page, tmp_path):
    page.goto(make_pipeline(tmp_path / "run", HOSTILE).as_uri())
    assert page.get_by_text("Stopped: sft: it rose.").count() == 1
    assert page.get_by_text("it rose; lower the lr").count() == 1
    assert page.get_by_text("held-out loss 1.500 nats a token").count() == 1
    assert page.get_by_text("not begun").count() == 1
    assert page.locator(".pair").count() == len(HOSTILE)
    page.click("text=its report")
    page.wait_for_selector(".tile")
    assert page.locator("h1").inner_text() == "run/sft"
