"""What must hold where one stage of a pipeline hands over to the next, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tandem.config import PpoConfig
from tandem.models.cards import read_card
from tandem.models.loading import load_tokenizer
from tandem.pipeline_config import PipelineConfig
from tandem.recipe import read_record
from tandem.run.record import fingerprint
from tandem.stages.joint_setup import term_names

_PROBE_TEXT = "The sea, 1984: was it quiet?\n\tYes  - naïve «слово» 言葉 \U0001f642 <|user|></s>"


@dataclass(frozen=True)
class Check:
    """One thing that must hold: where, what was compared and found, in words and in numbers, and whether it holds.

    `held` is None where it could not be told. `remedy` says what to do where it does not hold.
    """

    where: str
    name: str
    held: bool | None
    said: str
    numbers: Mapping[str, float]
    remedy: str

    def as_record(self) -> dict[str, Any]:
        """As it stands in the summary, with the remedy only where one is needed."""
        return asdict(self) if self.held is False else asdict(replace(self, remedy=""))


def checks_before(stage: str, config: PipelineConfig) -> Iterator[Check]:
    """What the joint stage must be handed: reward models that are better than a coin, made from its own start."""
    recipe = config.recipe_of(stage)
    if not isinstance(recipe, PpoConfig):
        return
    own = f"{config.folder_of('reward')}/model"
    for source, name in zip(recipe.rewards, term_names(recipe.rewards), strict=True):
        if source.model is not None and source.weight != 0:
            is_own = source.model == own
            yield accuracy(source.model, f"{'reward' if is_own else name} -> ppo", config, is_own=is_own)
        if source.model == own:
            yield same_start(config)


def checks_after(stage: str, config: PipelineConfig, summary: Mapping[str, Any]) -> Iterator[Check]:
    """What a stage must have kept or reached."""
    yield tokenizer(stage, config)
    if stage == "sft":
        yield likelihood(summary)
    elif stage == "dpo":
        yield reference_of_dpo(config, summary)
    elif stage == "ppo":
        yield reference_of_ppo(summary)
        yield value_start(config, summary)


def tokenizer(stage: str, config: PipelineConfig) -> Check:
    """The tokenizer that a stage saved reads and writes as the one that it was given."""
    start, trust = config.start_of(stage), config.compute.trust_remote_code
    given, kept = (load_tokenizer(source, "model", trust) for source in (start, f"{config.folder_of(stage)}/model"))
    parts = {
        "vocabulary": given.get_vocab() == kept.get_vocab(),
        "special tokens": given.special_tokens_map == kept.special_tokens_map,
        "chat template": given.chat_template == kept.chat_template,
        "ids of a probe text": given(_PROBE_TEXT).input_ids == kept(_PROBE_TEXT).input_ids,
    }
    other = [name for name, same in parts.items() if not same]
    of_template = "with its chat template" if given.chat_template else "without a chat template"
    return Check(
        where=f"{_starter(stage, config)} -> {stage}",
        name="tokenizer",
        held=not other,
        said=f"another {' and another '.join(other)} than {start} has"
        if other
        else f"the same tokenizer: {len(given.get_vocab())} tokens, {of_template}",
        numbers={"tokens": len(given.get_vocab())},
        remedy=f"its folder was changed, or saving lost something: take {config.folder_of(stage)} away to have it done "
        "again.",
    )


def likelihood(summary: Mapping[str, Any]) -> Check:
    """SFT has made held-out answers likelier than they were to the base."""
    before, after = (summary["heldout"][when].get("heldout/loss") for when in ("before", "after"))
    if before is None or after is None:
        return Check("sft", "held-out loss", None, "no rows are held out, so the loss is not known", {}, "")
    return Check(
        where="sft",
        name="held-out loss",
        held=after < before,
        said=f"held-out loss {before:.3f} -> {after:.3f} nats a token",
        numbers={"before": before, "after": after},
        remedy="it must fall: lower sft.optimizer.lr or sft.epochs, or give rows nearer to what the model is for.",
    )


def accuracy(source: str, where: str, config: PipelineConfig, *, is_own: bool) -> Check:
    """A reward model orders held-out pairs as people did, more often than the floor asks."""
    card = read_card(source)
    if card is None or card.heldout_accuracy is None:
        held = None if not is_own or config.accuracy_floor == 0 else False
        said = f"{source} carries no held-out accuracy"
        return Check(
            where, "accuracy", held, said, {}, "hold out pairs by reward.data.eval or reward.data.eval_fraction."
        )
    floor = card.above_chance if config.accuracy_floor is None else config.accuracy_floor
    meaning = ", two standard errors above chance" if config.accuracy_floor is None else ""
    found = card.heldout_accuracy
    return Check(
        where=where,
        name="accuracy",
        held=found >= floor,
        said=f"accuracy {found:.3f} on {card.heldout_pairs} held-out pairs, floor {floor:.3f}{meaning}",
        numbers={"accuracy": found, "pairs": card.heldout_pairs, "floor": floor},
        remedy="a policy would climb this reward and learn nothing that it was meant to: give it more or clearer "
        "pairs, or other settings (--reward.epochs, --reward.optimizer.lr), or lower accuracy_floor."
        if is_own
        else "give another reward model, or lower accuracy_floor.",
    )


def same_start(config: PipelineConfig) -> Check:
    """The policy starts from the very weights that the reward model was trained from."""
    start = config.start_of("ppo")
    before = read_record(Path(config.folder_of("reward")))["inputs"].get("model", {}).get("sha256")
    now = None if before is None else fingerprint(Path(start))
    return Check(
        where="reward -> ppo",
        name="one start",
        held=None if before is None else before == now,
        said=f"reward model and policy start from the same files in {start}"
        if before is not None and before == now
        else f"the files of {start} are not local, so not compared"
        if before is None
        else f"{start} is not what the reward model was trained from",
        numbers={},
        remedy=f"it was changed after reward began: take {config.folder_of('reward')} away to have it done again.",
    )


def reference_of_ppo(summary: Mapping[str, Any]) -> Check:
    """Before the first step policy and reference were one model; the stage itself refuses a larger gap."""
    gap = summary["start"]["reference"]
    said = f"policy and reference were one model before the first step: log-probabilities at most {gap:.1g} nats apart"
    return Check("start of ppo", "reference", True, said, {"nats_a_token": gap}, "")


def reference_of_dpo(config: PipelineConfig, summary: Mapping[str, Any]) -> Check:
    """The same of DPO, by the held-out answers before the first step."""
    rewards = [summary["heldout"]["before"].get(f"heldout/reward_{side}") for side in ("chosen", "rejected")]
    if config.dpo is None or any(reward is None for reward in rewards):
        return Check(
            "start of dpo", "reference", None, "no pairs are held out, so the reference was not compared", {}, ""
        )
    gap = max(abs(reward) for reward in rewards) / config.dpo.beta
    return Check(
        where="start of dpo",
        name="reference",
        held=gap <= 0.01,
        said=f"policy and reference were one model before the first step: held-out answers {gap:.1g} nats apart",
        numbers={"nats_an_answer": gap},
        remedy=f"{config.start_of('dpo')} does not give the same numbers twice; is it being written to?",
    )


def value_start(config: PipelineConfig, summary: Mapping[str, Any]) -> Check:
    """The value model began as the reward model; the stage itself refuses one that did not."""
    gap = summary["start"]["value"]
    if config.ppo is not None and config.ppo.value.start == "policy":
        said = "the value model started from the policy's trunk and a zero head, as the recipe asks"
        return Check("start of ppo", "value model", None, said, {}, "")
    if gap is None:
        said = "the value model started from the reward model's trunk, with a head of its own or without probe texts"
        return Check("start of ppo", "value model", None, said, {}, "")
    said = f"the value model answered as the reward model did: at most {gap:.1g} apart on its probe texts"
    return Check("start of ppo", "value model", True, said, {"score": gap}, "")


def _starter(stage: str, config: PipelineConfig) -> str:
    return "base" if config.sft is None or stage == "sft" else "sft"
