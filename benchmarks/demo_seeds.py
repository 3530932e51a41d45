"""Sets finished demo runs side by side: docs/results/demo.md and demo.json.

usage: demo_seeds.py RUN_DIR [RUN_DIR ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"

COLUMNS = {
    "seed": lambda s: str(s["seed"]),
    "reward model, held-out pairs": lambda s: f"{s['reward_model']['heldout_accuracy']:.3f}",
    "gold before": lambda s: f"{s['gold']['before']:.3f}",
    "gold after": lambda s: f"{s['gold']['after']:.3f}",
    "gain": lambda s: f"{s['gold']['after'] - s['gold']['before']:+.3f}",
    "reward model before": lambda s: f"{s['reward']['before']:.2f}",
    "after": lambda s: f"{s['reward']['after']:.2f}",
    "KL, nats a sequence": lambda s: f"{s['kl']['after']:.2f}",
    "explained variance": lambda s: f"{s['explained_variance']:.2f}",
    "length before": lambda s: f"{s['length']['before']:.1f}",
    "length after": lambda s: f"{s['length']['after']:.1f}",
    "seconds": lambda s: f"{s['seconds']:.0f}",
    "GiB": lambda s: f"{s['peak_memory_gib']:.2f}",
}


def page(summaries: list[dict[str, Any]]) -> str:
    first = summaries[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        "# The demo on several seeds",
        "",
        "Made by `make demo-seeds`, which runs `tandem demo --seed N` one after the other and sets them side by side.",
        f"Machine: {first['device']}, {first['threads']} threads; {versions}. The set-up and the first conversion of "
        "the model are not in the seconds.",
        "",
        f"All figures but the reward model's are over {first['heldout_responses']} continuations of openings that no "
        "training step saw; the standard error of a mean gold score is about 0.033. The seed also decides which "
        "openings those are.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---:|" * len(COLUMNS),
        *("| " + " | ".join(show(summary) for show in COLUMNS.values()) + " |" for summary in summaries),
        "",
        "## Samples",
        "The first continuation of each of the first four held-out openings of each seed; none is picked.",
        "",
    ]
    for summary in summaries:
        lines += [f"### Seed {summary['seed']}", "", "| opening | before | after |", "|---|---|---|"]
        for sample in summary["samples"]:
            cells = [" ".join(sample[name].split()).replace("|", "\\|") for name in ("opening", "before", "after")]
            cells[1] += f" ({sample['gold']['before']:+.2f})"
            cells[2] += f" ({sample['gold']['after']:+.2f})"
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(folders: list[str]) -> None:
    summaries = [json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "demo.md").write_text(page(summaries), encoding="utf-8")
    kept = [{name: value for name, value in summary.items() if name != "model"} for summary in summaries]
    (RESULTS / "demo.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
