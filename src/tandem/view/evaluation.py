"""What came of an evaluation, for people: tables for the terminal and a page, from the same cells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from tandem.errors import one_line

Summary = Mapping[str, Any]

FEW_PROMPTS = 30
CHANGED_MIND = 0.2
LESS_DIVERSE = 0.9
MORE_REPETITION = 0.02
OTHER_ENDS = 0.1

_WRITING = {
    "tokens": ("length, tokens", "{:.1f}"),
    "characters": ("length, characters", "{:.0f}"),
    "eos_rate": ("ended by itself", "{:.0%}"),
    "repetition": ("repeated runs of 4 tokens", "{:.1%}"),
    "distinct_1": ("different tokens", "{:.1%}"),
    "distinct_2": ("different runs of 2 tokens", "{:.1%}"),
    "distance_within_prompt": ("distance within a prompt, 0 to 1", "{:.2f}"),
}
_RUN_OF_BACKTICKS = re.compile("`+")


@dataclass(frozen=True)
class Cells:
    """A table as text: its title, the names of its columns, and its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(summary: Summary) -> list[Table]:
    """The tables for a terminal."""
    return [_on_terminal(cells) for cells in _all_cells(summary)]


def page(summary: Summary) -> str:
    """The evaluation in Markdown."""
    parts = [f"# {one_line(summary['model'])} against {one_line(summary['baseline'])}\n", f"{headline(summary)}\n"]
    if summary["notes"]:
        parts.append("## What to mind\n\n" + "".join(f"- {note}\n" for note in summary["notes"]))
    parts += [f"## {cells.title}\n\n{_in_markdown(cells)}" for cells in _all_cells(summary)]
    parts.append(f"## The first responses to the first prompts\n\nNone of them is picked.\n\n{_samples(summary)}")
    parts.append(f"## How it was done\n\n{_how(summary)}")
    return "\n".join(parts)


def headline(summary: Summary) -> str:
    """The first judge's comparison with the baseline, in a sentence."""
    found = summary["comparisons"][0]
    count = found["wins"] + found["ties"] + found["losses"]
    return (
        f"By {one_line(found['judge'])}, the model wins {_share(found['win_rate'])} of {count} comparisons with "
        f"the {found['against']} on {summary['prompts']} prompts; at equal length {_share(found['length_controlled'])}."
    )


def notes(summary: Summary) -> list[str]:
    """What a reader of the numbers should not overlook."""
    return [
        *_notes_on_data(summary),
        *(note for found in summary["comparisons"] for note in _notes_on_comparison(found)),
        *_notes_on_judges(summary["comparisons"]),
        *_notes_on_writing(summary["writing"]),
    ]


def _notes_on_data(summary: Summary) -> Iterator[str]:
    if summary["trained_on"]:
        yield (
            "The model was trained on this very file of prompts, by the recipe beside it: what it does on others may "
            "be worse."
        )
    if summary["prompts"] < FEW_PROMPTS:
        yield f"Only {summary['prompts']} prompts: the intervals hold for prompts like these, and are rough."
    if summary["kl"].get("unmeasured"):
        yield f"No KL is measured: {summary['kl']['unmeasured']}."


def _notes_on_comparison(found: Mapping[str, Any]) -> Iterator[str]:
    judge, against = one_line(found["judge"]), one_line(found["against"])
    raw, controlled = found["win_rate"], found["length_controlled"]
    if raw["value"] is None:
        yield f"{judge} has compared nothing with {against}."
        return
    if _undecided(raw):
        yield f"{judge} does not tell the model from {against}: the interval holds 50%. More prompts would narrow it."
    elif raw["high"] < 0.5:
        yield f"By {judge} the model is worse than {against}."
    elif controlled["value"] is None:
        yield f"By {judge} the lead over {against} cannot be told from length: every difference in length is the same."
    elif _undecided(controlled) or controlled["high"] < 0.5:
        yield f"By {judge} the lead over {against} may be one of length: at equal length the interval reaches 50%."
    if found["unjudged"]:
        yield f"{found['unjudged']} comparisons with {against} have no verdict by {judge}, and count nowhere."
    position = found["position"]
    if position and position["inconsistent"] >= CHANGED_MIND:
        yield (
            f"{judge} changed its mind with the order in {position['inconsistent']:.0%} of pairs with {against}, which "
            f"count as ties; {position['preference_for_first']:.0%} of its verdicts went to the response shown first."
        )


def _notes_on_judges(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where the first judge sees a lead that another one does not."""
    for first in comparisons:
        if first["judge"] != comparisons[0]["judge"] or not _ahead(first):
            continue
        doubting = [
            one_line(other["judge"])
            for other in comparisons
            if other["against"] == first["against"] and other is not first and not _ahead(other)
        ]
        if doubting:
            yield (
                f"{one_line(first['judge'])} sees the model ahead of {one_line(first['against'])}, "
                f"{' and '.join(doubting)} not: if the model was trained on the first, that may be over-optimisation."
            )


def _notes_on_writing(writing: Mapping[str, Mapping[str, float | None]]) -> Iterator[str]:
    ours, theirs = writing["model"], writing["baseline"]

    def both(name: str) -> tuple[float, float] | None:
        a, b = ours[name], theirs[name]
        return None if a is None or b is None else (a, b)

    for name, words in (
        ("distinct_2", "different runs of 2 tokens"),
        ("distance_within_prompt", "distance between responses to one prompt"),
    ):
        pair = both(name)
        if pair and pair[0] < LESS_DIVERSE * pair[1]:
            yield f"The model is less diverse than the baseline: {words} {pair[0]:.2f} against {pair[1]:.2f}."
    repeated = both("repetition")
    if repeated and repeated[0] > repeated[1] + MORE_REPETITION:
        yield f"The model repeats itself more than the baseline: {repeated[0]:.1%} of runs against {repeated[1]:.1%}."
    ends = both("eos_rate")
    if ends and abs(ends[0] - ends[1]) > OTHER_ENDS:
        yield (
            f"{ends[0]:.0%} of the model's responses end by themselves, {ends[1]:.0%} of the baseline's: the others "
            "are cut at rollout.max_new_tokens, and judged so."
        )


def _ahead(found: Mapping[str, Any]) -> bool:
    return found["win_rate"]["value"] is not None and found["win_rate"]["low"] > 0.5


def _undecided(interval: Mapping[str, float]) -> bool:
    return interval["low"] <= 0.5 <= interval["high"]


def _all_cells(summary: Summary) -> list[Cells]:
    found = [_who_wins(summary), _scores(summary), _order(summary), _how_they_write(summary), _benchmarks(summary)]
    return [cells for cells in found if cells.rows]


def _who_wins(summary: Summary) -> Cells:
    rows = [
        [
            found["against"],
            found["judge"],
            _share(found["win_rate"]),
            _share(found["length_controlled"]),
            f"{found['wins']}/{found['ties']}/{found['losses']}",
        ]
        for found in summary["comparisons"]
    ]
    columns = ["against", "judge", "wins (95%)", "at equal length", "won/tied/lost"]
    return Cells("Who wins", columns, rows)


def _scores(summary: Summary) -> Cells:
    rows = []
    for found in summary["comparisons"]:
        if (score := found["score"]) is not None:
            difference = f"{_signed(score['difference'])} +- {_number(score['standard_error'])}"
            rows.append(
                [found["against"], found["judge"], _number(score["model"]), _number(score["other"]), difference]
            )
    columns = ["against", "judge", "model's", "other's", "difference +- s.e."]
    return Cells("Mean scores", columns, rows)


def _order(summary: Summary) -> Cells:
    rows = [
        [
            found["against"],
            found["judge"],
            f"{found['position']['inconsistent']:.0%}",
            f"{found['position']['preference_for_first']:.0%}",
        ]
        for found in summary["comparisons"]
        if found["position"] is not None
    ]
    columns = ["against", "judge", "decided by the order", "for the first shown"]
    return Cells("Position bias", columns, rows)


def _how_they_write(summary: Summary) -> Cells:
    writing = summary["writing"]
    rows = [
        [words, *("-" if side[name] is None else form.format(side[name]) for side in writing.values())]
        for name, (words, form) in _WRITING.items()
    ]
    rows.append(["KL to reference, nats a sequence", *(_kl(summary, side) for side in writing)])
    return Cells("How they write", ["", *writing], rows)


def _kl(summary: Summary, side: str) -> str:
    kl = summary["kl"]
    if side == "model":
        measured = kl.get("nats_a_sequence")
        return "-" if measured is None else f"{_number(measured)} +- {_number(kl['standard_error'])}"
    if side == "baseline":
        return "0" if summary["reference"] == summary["baseline"] else "-"
    return f"at most {kl['best_of_n_bound']:.2f}"


def _benchmarks(summary: Summary) -> Cells:
    found = summary["benchmarks"]
    rows = [
        [task, metric.removesuffix(",none"), f"{value:.4f}", f"{found['baseline'][task][metric]:.4f}"]
        for task, metrics in found.get("model", {}).items()
        for metric, value in metrics.items()
        if value is not None and found["baseline"][task].get(metric) is not None
    ]
    return Cells("Benchmarks, by lm-evaluation-harness", ["task", "metric", "model", "baseline"], rows)


def _samples(summary: Summary) -> str:
    parts = []
    for sample in summary["samples"]:
        prompt = sample["prompt"]
        text = prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        named = {"prompt": text, **sample["responses"]}
        parts.append("".join(f"{name}:\n{_fenced(said)}\n" for name, said in named.items()))
    return "\n---\n\n".join(parts)


def _how(summary: Summary) -> str:
    n, responses, reference = summary["best_of_n"], summary["responses_per_prompt"], one_line(summary["reference"])
    each = "one response" if responses == 1 else f"{responses} responses"
    best = f" The best of {n} is that of {n} responses of the reference, by the score of the first judge." if n else ""
    return (
        f"{each.capitalize()} of each model to each of {summary['prompts']} prompts of "
        f"{one_line(summary['prompts_file'])}, at temperature {summary['temperature']:g} and at most "
        f"{summary['max_new_tokens']} tokens; seed {summary['seed']}.{best} Reference: {reference}. "
        f"{summary['seconds']:.0f} s on {summary['device']}. Every comparison stands in pairs.jsonl, every number in "
        "summary.json; what each means and does not mean: docs/evaluation.md.\n"
    )


def _share(interval: Mapping[str, float | None]) -> str:
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None or low is None or high is None:
        return "-"
    return f"{value:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _on_terminal(cells: Cells) -> Table:
    table = Table(title=cells.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(cells.columns):
        table.add_column(
            escape(one_line(name)), justify="left" if number == 0 else "right", no_wrap=number > 0, overflow="fold"
        )
    for row in cells.rows:
        table.add_row(*(escape(one_line(cell)) for cell in row))
    return table


def _in_markdown(cells: Cells) -> str:
    lines = [cells.columns, ["---"] * len(cells.columns), *cells.rows]
    return "".join(f"| {' | '.join(_words(cell) for cell in line)} |\n" for line in lines)


def _words(text: str) -> str:
    """A name on one line that breaks no table."""
    return one_line(text).replace("|", "\\|")


def _fenced(text: str) -> str:
    """A text as it is, behind a fence that it cannot close."""
    shown = "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.splitlines())
    fence = "`" * max(3, 1 + max((len(run) for run in _RUN_OF_BACKTICKS.findall(text)), default=0))
    return f"{fence}text\n{shown}\n{fence}"
