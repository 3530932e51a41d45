"""The page of what was done to runs, and what they lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "page.md"
SUITE_WORDS = {
    "test_resume.py": (
        "checkpoints damaged, locks live and stale",
        "the checkpoint before is used, said; refused, said",
    ),
    "test_faults.py": ("NaN and infinity at each place that a number comes from", "step skipped, counted, kept"),
    "test_rewards.py": ("rewards that raise, hang, or answer wrongly", "the sample is named; fails or is left out"),
    "test_remote_rewards.py": ("reward servers that are slow, refuse, fail or answer half", "tried again, then told"),
    "test_bad_input.py": ("bad recipes, data, models and folders", "exit status 2 and one message"),
    "test_properties.py": ("properties of parsers and collation, many examples each", "hold"),
}


def page(found: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The page, and what was lost or went wrong."""
    lost: list[str] = []
    lines = [
        "| what was done | times | what happened | lost |",
        "|---|---:|---|---|",
        *_of_signals(found["stories"], lost),
        _of_slow_update(found["slow_update"], lost),
        _of_disk(found["full_disk"], lost),
        *(_of_suite(suite, lost) for suite in found["suites"]),
    ]
    return TEMPLATE.read_text(encoding="utf-8").replace("TABLE", "\n".join(lines)), lost


def _of_signals(stories: Sequence[Mapping[str, Any]], lost: list[str]) -> list[str]:
    words = {"SIGKILL": "`kill -9` at a random moment", "SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}
    rows = []
    for number, said in words.items():
        for task in dict.fromkeys(story["task"] for story in stories if story["signal"] == number):
            chosen = [story for story in stories if (story["signal"], story["task"]) == (number, task)]
            ends = [end for story in chosen for end in story["ends"]]
            different = [name for story in chosen for name in story["differences"]]
            lost += [f"{task}, {number}: {name} differs" for name in different]
            happened = f"{len(chosen)} runs went on and ended bit-identical" if not different else ", ".join(different)
            if number == "SIGKILL":
                happened += f"; {sum(end['in_save'] for end in ends)} ends fell into a save"
            else:
                happened += f"; saved and ended within {max(end['seconds'] for end in ends):.1f} s, status 130"
                lost += [f"{task}, {number}: status {end['status']}" for end in ends if end["status"] != 130]
            rows.append(f"| {said}: {task} | {len(ends)} | {happened} | {'nothing' if not different else 'yes'} |")
    return rows


def _of_slow_update(found: Mapping[str, Any], lost: list[str]) -> str:
    good = found["status"] == 130 and found["seconds"] <= found["grace"] and not found["differences"]
    if not good:
        lost.append(f"slow update: {found}")
    return (
        f"| SIGTERM in an update of over 10 s, with {found['grace']:g} s to live | 1 | given up, the state before it "
        f"saved within {found['seconds']:.1f} s; went on and ended bit-identical | {'nothing' if good else 'yes'} |"
    )


def _of_disk(found: Mapping[str, Any] | None, lost: list[str]) -> str:
    if found is None:
        return "| a disk that runs full | 0 | not tried: no file system could be mounted here | |"
    good = found["status"] == 1 and "No space left" in found["said"] and not found["differences"]
    if not good:
        lost.append(f"full disk: {found}")
    return (
        "| a disk that runs full while a run trains | 1 | ended with one message; given room, it went on and ended "
        f"bit-identical | {'nothing' if good else 'yes'} |"
    )


def _of_suite(suite: Mapping[str, Any], lost: list[str]) -> str:
    done, happened = SUITE_WORDS[suite["file"]]
    if suite["failed"]:
        lost.append(f"{suite['file']}: {suite['failed']} of {suite['cases']} failed")
    ran = suite["cases"] - suite["skipped"]
    return f"| {done} (`tests/{suite['file']}`) | {ran} | {happened} | {'nothing' if not suite['failed'] else 'yes'} |"
