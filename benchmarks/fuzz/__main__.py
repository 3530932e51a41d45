"""Damaged recipes, settings and data files: docs/results/fuzz.md and .json.

usage: python -m fuzz [CASES] [SEED]

Each case is read as its stage would read it, and must give a result or an InputError whose message is one line that
names the file. Anything else is a finding: it is printed, its input is kept in runs/fuzz/, and the exit status is 1.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz.inputs import drawn, make, reader
from fuzz.report import page
from fuzz.valid import tokenizer
from tandem.errors import InputError, one_line

ROOT = Path(__file__).parents[2]
RESULTS, KEPT = ROOT / "docs" / "results", ROOT / "runs" / "fuzz"
SLOW_SECONDS = 10.0


def outcome(form: str, path: Path, read: Any) -> tuple[str, str]:
    """`read`, `refused`, or `finding`, and what is wrong with it."""
    started = time.monotonic()
    try:
        read()
        found = ("read", "")
    except InputError as error:
        said = str(error)
        named = path.name in said or (form == "overrides" and (".toml: " in said or said[:1] in "-'\""))
        does = bool(said) and said == one_line(said) and named
        found = ("refused", said) if does else ("finding", f"a message that does not do: {said!r}")
    except Exception as error:
        found = ("finding", f"{type(error).__name__}: {str(error)[:200]!r}")
    seconds = time.monotonic() - started
    return ("finding", f"took {seconds:.0f} s") if seconds > SLOW_SECONDS else found


def main(cases: int, seed: int) -> int:
    logging.disable(logging.WARNING)
    reading, counts, findings = tokenizer(), Counter[tuple[str, str]](), []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(cases):
            form, stage, chance = drawn(number, seed)
            path = Path(scratch) / f"case.{'txt' if form == 'overrides' else form}"
            path.write_bytes(make(form, stage, chance))
            kind, said = outcome(form, path, reader(form, stage, path, reading))
            counts[form, kind] += 1
            if kind == "finding":
                KEPT.mkdir(parents=True, exist_ok=True)
                kept = shutil.copy(path, KEPT / f"{seed}-{number}-{stage}{path.suffix}")
                findings.append({"case": number, "format": form, "stage": stage, "said": said})
                print(f"FINDING seed {seed} case {number} ({form}, {stage}): {said}\n  kept as {kept}", flush=True)
    everything = {
        "cases": cases,
        "seed": seed,
        "counts": {form: {kind: counts[form, kind] for kind in KINDS} for form in dict.fromkeys(f for f, _ in counts)},
        "findings": findings,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "fuzz.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    text = page(everything)
    (RESULTS / "fuzz.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if findings else 0


KINDS = ("read", "refused", "finding")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*given, *(2000, 0)[len(given) :]))
