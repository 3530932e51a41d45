"""What a reward model carries with it: how good it was on held-out pairs, and how to know it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from tandem.config import AdapterSection
from tandem.errors import InputError, reason_of
from tandem.models.loading import REWARD_CARD
from tandem.models.scoring import Scorer


@dataclass(frozen=True)
class Probe:
    """A text and the score that the reward model gave it when it was saved."""

    ids: list[int]
    score: float


@dataclass(frozen=True)
class RewardCard:
    """Saved beside a reward model as tandem.json.

    `heldout_accuracy` over `heldout_pairs` pairs that it was not trained on (None where there were none);
    `adapter` holds its LoRA settings
    where it was trained as an adapter of `base`.
    """

    base: str
    heldout_accuracy: float | None
    heldout_pairs: int
    adapter: AdapterSection | None
    probes: list[Probe]

    def near_chance(self) -> bool:
        """Whether the accuracy is less than two standard errors above a coin's."""
        return (
            self.heldout_accuracy is not None
            and self.heldout_accuracy < 0.5 + 2 * (0.25 / max(1, self.heldout_pairs)) ** 0.5
        )


def make_probes(scorer: Scorer, texts: Sequence[Sequence[int]]) -> list[Probe]:
    scores = scorer.score(texts).tolist()
    return [Probe(list(text), score) for text, score in zip(texts, scores, strict=True)]


def probe_scores(scorer: Scorer, card: RewardCard) -> Tensor:
    return scorer.score([probe.ids for probe in card.probes])


def write_card(card: RewardCard, folder: Path) -> None:
    content = asdict(card) | {"adapter": card.adapter and card.adapter.model_dump()}
    (folder / REWARD_CARD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_card(source: str) -> RewardCard | None:
    """The card of a reward model, or None where it has none (it was trained elsewhere)."""
    path = Path(source) / REWARD_CARD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        adapter = content["adapter"] and AdapterSection(**content["adapter"])
        probes = [Probe([int(token) for token in probe["ids"]], float(probe["score"])) for probe in content["probes"]]
        accuracy = content["heldout_accuracy"]
        numbers = {
            "heldout_accuracy": None if accuracy is None else float(accuracy),
            "heldout_pairs": int(content["heldout_pairs"]),
        }
        return RewardCard(**content | numbers | {"base": str(content["base"]), "adapter": adapter, "probes": probes})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({reason_of(error)}); copy the reward model's folder again, or "
            "remove this file to use the model without what it says."
        ) from error
