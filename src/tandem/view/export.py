"""The viewer without a server: one page, or a folder whose samples are read when they are looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.errors import InputError
from tandem.view.page import GENERATOR, embedded, self_contained, write_page
from tandem.view.reading import RunRecord
from tandem.view.sample_index import IndexedFile, SampleIndex
from tandem.view.samples import sample_content
from tandem.view.server import viewer_content

# A page that holds more than this is slow to open; a folder is read bit by bit.
LARGEST_PAGE = 200 * 2**20


def export(run: RunRecord, path: Path) -> Path:
    """Write the viewer with all samples to FILE.html, or to a folder; returns the page to open.

    Raises InputError where it cannot be written, where one page would be too large, or where the folder holds
    something that is no earlier export.
    """
    try:
        return _export_page(run, path) if path.suffix.lower() in (".html", ".htm") else _export_folder(run, path)
    except OSError as error:
        raise InputError(f"--export {path} cannot be written: {error.strerror}.") from error


def _export_page(run: RunRecord, path: Path) -> Path:
    if path.is_dir():
        raise InputError(f"--export {path} is a folder; give the name of a file, or of a folder without .html.")
    samples = SampleIndex(run)
    data: dict[str, Any] = {"index": viewer_content(run, samples)}
    size = sum(entry.size for indexed in samples.files for entry in indexed.entries)
    if size > LARGEST_PAGE:
        raise InputError(
            f"--export {path}: the samples are {size / 2**20:.0f} MiB, too much for one page (the most is "
            f"{LARGEST_PAGE / 2**20:.0f}); give a folder, such as --export {path.with_suffix('')}."
        )
    for indexed in samples.files:
        data[f"file-{indexed.file.name}"] = list(_contents(samples, indexed))
    write_page(path, self_contained("viewer.html", title=f"{run.name}: tokens", data=data))
    return path


def _export_folder(run: RunRecord, path: Path) -> Path:
    page, folder = path / "index.html", path / "data"
    if path.exists() and not path.is_dir():
        raise InputError(f"--export {path} is a file; give a name that ends in .html, or a folder.")
    if path.is_dir() and any(path.iterdir()) and not _is_export(page):
        raise InputError(f"--export {path} holds something that is no earlier export; choose another folder.")
    samples = SampleIndex(run)
    data = {"index": viewer_content(run, samples)}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.js"):
        old.unlink()
    for indexed in samples.files:
        content = json.dumps(embedded(list(_contents(samples, indexed))))
        text = f"receive({embedded(indexed.file.name)}, JSON.parse({content}));\n"
        write_page(folder / f"{indexed.file.name}.js", text)
    write_page(page, self_contained("viewer.html", title=f"{run.name}: tokens", data=data, source="folder"))
    return page


def _contents(samples: SampleIndex, indexed: IndexedFile) -> Iterator[dict[str, Any]]:
    for row in range(len(indexed.entries)):
        yield sample_content(samples.sample(indexed.file.name, row))


def _is_export(page: Path) -> bool:
    try:
        return GENERATOR in page.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
