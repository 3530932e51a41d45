"""What a reward model carries with it: how good it was on held-out pairs, and how to know it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from tandem.algo import ByLength
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

    `heldout_accuracy` over `heldout_pairs` pairs that it was not trained on (None where there were none), `by_length`
    the same by which answer is the longer one (None in cards of old); `adapter` holds its LoRA settings where it was
    trained as an adapter of `base`.
    """

    base: str
    heldout_accuracy: float | None
    heldout_pairs: int
    by_length: ByLength | None
    adapter: AdapterSection | None
    probes: list[Probe]

    @property
    def above_chance(self) -> float:
        """The accuracy that is two standard errors above a coin's on as many pairs."""
        return 0.5 + 2 * (0.25 / max(1, self.heldout_pairs)) ** 0.5

    def near_chance(self) -> bool:
        """Whether the accuracy is less than two standard errors above a coin's."""
        return self.heldout_accuracy is not None and self.heldout_accuracy < self.above_chance

    def doubts(self) -> list[str]:
        """What speaks against training a policy under it, in words for a person."""
        found = []
        if self.near_chance():
            found.append(
                f"accuracy {self.heldout_accuracy:.3f} on {self.heldout_pairs} held-out pairs is chance. A policy will "
                "climb this reward all the same and learn nothing that it was meant to; train a better reward model "
                "first."
            )
        if self.by_length is not None and self.by_length.only_length():
            longer, shorter = self.by_length.longer, self.by_length.shorter
            found.append(
                f"it has learnt length: accuracy {longer:.2f} where the chosen answer is the longer one, {shorter:.2f} "
                "where it is the shorter one. A policy will grow longer or shorter under it, and no better; give it "
                "pairs of equal length, or more of the rarer kind."
            )
        return found


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
        by_length = content.get("by_length") and ByLength(**content["by_length"])
        made = {"base": str(content["base"]), "by_length": by_length, "adapter": adapter, "probes": probes}
        return RewardCard(**content | numbers | made)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({reason_of(error)}); copy the reward model's folder again, or "
            "remove this file to use the model without what it says."
        ) from error
