"""The page of what became of damaged inputs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

READ_AS = {
    "toml": "a recipe",
    "overrides": "settings on the command line",
    "jsonl": "rows",
    "json": "rows",
    "csv": "rows",
    "parquet": "rows",
}


def page(everything: Mapping[str, Any]) -> str:
    """Counts by format and outcome."""
    counts = everything["counts"]
    lines = [
        "# Damaged input",
        "",
        f"Made by `make fuzz CASES={everything['cases']}` (seed {everything['seed']}, Python "
        f"{platform.python_version()}). Recipes of the repository and rows in all conventions of the three stages are "
        "damaged, half of them in their bytes and lines, half in the tree that they spell (values swapped for nasty "
        "ones, keys renamed, dropped, doubled and wrapped), and read as a stage reads them, up to tokens.",
        "",
        "A case passes where it is read, or refused by one line that names the file; a traceback, another kind of "
        "error, several lines or more than 10 s are findings.",
        "",
        "| format | as | cases | read | refused in one line | findings |",
        "|---|---|---|---|---|---|",
        *(
            f"| {form} | {READ_AS[form]} | {sum(kinds.values())} | {kinds['read']} | {kinds['refused']} | "
            f"{kinds['finding']} |"
            for form, kinds in counts.items()
        ),
        f"| all | | {everything['cases']} | "
        + " | ".join(str(sum(kinds[kind] for kinds in counts.values())) for kind in ("read", "refused", "finding"))
        + " |",
    ]
    if everything["findings"]:
        lines += ["", "## Findings"]
        lines += [
            f"- case {one['case']} ({one['format']}, {one['stage']}): {one['said']}" for one in everything["findings"]
        ]
    return "\n".join(lines) + "\n"
