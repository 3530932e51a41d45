"""The four models of the joint stage, and how they share parameters.

separate: the policy, a frozen copy of it as the reference, and a value model of its own.
adapters: one frozen trunk, which is the reference; policy, value and reward model are LoRA adapters on it.
head: a value head on the policy's own trunk; the reference is a frozen copy, or the trunk with adapters off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tandem.algo import Histogram
from tandem.config import AdapterSection, ComputeSection, PpoConfig, ValueSection
from tandem.errors import InputError
from tandem.models.cards import RewardCard, probe_scores, read_card
from tandem.models.causal import CausalPolicy, SamplingRule
from tandem.models.loading import (
    check_classifier,
    context_length,
    load_tokenizer,
    padding_id,
    pick_device,
    pick_dtype,
)
from tandem.models.saving import ADAPTER_FOLDER, load_adapter
from tandem.models.scalar import ScalarModel, load_classifier, zero_head
from tandem.models.scoring import ClassifierScorer, DecoderScorer, Scorer
from tandem.models.trunk import Trunk
from tandem.models.unread import load_trunk
from tandem.types import Tokens


@dataclass(frozen=True)
class JointModels:
    """Policy, reference and value model, and the parameters of their trunks that train.

    `shared` is policy and value model as one, where they stand on the same trainable trunk; the value model then
    has no parameters of its own but its head.
    """

    policy: CausalPolicy
    reference: CausalPolicy
    value: ScalarModel
    policy_parameters: Sequence[nn.Parameter]
    value_parameters: Sequence[nn.Parameter]
    shared: PolicyWithValueHead | None = None


class PolicyWithValueHead:
    """A policy and a value model that read the same hidden states."""

    def __init__(self, policy: CausalPolicy, value: ScalarModel) -> None:
        assert policy.trunk is value.trunk
        assert policy.adapter == value.adapter
        self.policy = policy
        self.value = value

    @property
    def scale(self) -> float:
        return self.value.scale

    def logprobs_and_values(
        self, tokens: Tokens, *, entropies: bool, stop_gradient: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probabilities [B, T], entropies [B, T] if asked for, and values [B, T + 1], from one pass.

        In place of values, a categorical head gives its logits [B, T + 1, K]. With `stop_gradient` the values send
        none into the trunk.
        """

        def read() -> tuple[Tensor, Tensor | None, Tensor]:
            hidden = self.policy.trunk.hidden(tokens, self.policy.adapter)
            logprobs, found = self.policy.read(hidden, tokens, entropies=entropies)
            states = hidden.detach() if stop_gradient else hidden
            of_value = self.value.read if self.value.histogram is None else self.value.read_bins
            return logprobs, found, of_value(states, tokens)

        return self.policy.trunk.run(read)


@dataclass(frozen=True)
class RewardModel:
    """A reward model ready to score, with the tokenizer that it reads through."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    card: RewardCard | None
    context: int | None


@dataclass(frozen=True)
class Placement:
    """Where and how models compute, and whether Python code that comes with them is run; `say` tells a person."""

    device: torch.device
    dtype: torch.dtype
    tokens_per_microbatch: int
    trust_remote_code: bool
    say: Callable[[str], None]

    @classmethod
    def of(cls, compute: ComputeSection, say: Callable[[str], None]) -> Placement:
        """As a recipe's [compute] section says. Raises InputError where there is no such device."""
        device = pick_device(compute.device)
        dtype = pick_dtype(compute.precision, device)
        return cls(device, dtype, compute.tokens_per_microbatch, compute.trust_remote_code, say)

    def trunk(self, source: str, key: str) -> Trunk:
        return load_trunk(source, key, self.dtype, self.device, self.trust_remote_code, self.say)

    def classifier(self, source: str, key: str) -> ScalarModel | PreTrainedModel:
        return load_classifier(source, key, self.dtype, self.device, self.trust_remote_code, self.say)

    def tokenizer(self, source: str, key: str) -> PreTrainedTokenizerBase:
        return load_tokenizer(source, key, self.trust_remote_code)


def build_joint(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase, placement: Placement
) -> tuple[JointModels, dict[str, RewardModel]]:
    """Load all models of a joint run: those that train, and its reward models by their source."""
    sources = [source.model for source in config.rewards if source.model is not None]
    if config.sharing.mode == "adapters":
        return _adapters(config, sources, tokenizer, placement)
    if config.sharing.mode == "head":
        return _head(config, sources, tokenizer, placement)
    models = _separate(config, sources, tokenizer, placement)
    return models, {source: load_reward(source, reward_key(config, source), placement) for source in sources}


def sampling_rule(config: PpoConfig) -> SamplingRule:
    """What the policy samples under, and is trained under."""
    return SamplingRule(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p)


def _reference_rule(config: PpoConfig) -> SamplingRule:
    """The reference keeps its whole support: truncated, it would give sampled tokens no probability at all."""
    return SamplingRule(config.rollout.temperature, None, 1.0)


def _separate(
    config: PpoConfig, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, placement: Placement
) -> JointModels:
    def trunk() -> Trunk:
        return placement.trunk(config.policy.model, "policy.model")

    policy, reference = CausalPolicy(trunk(), sampling_rule(config)), CausalPolicy(trunk(), _reference_rule(config))
    if config.value.start == "reward":
        check_same_tokenizer(sources[0], tokenizer, placement)
        start = _decoder_with_head(sources[0], reward_key(config, sources[0]), placement)
        _verify_transfer(sources[0], start, placement)
        value_trunk, head = start.trunk, value_head(config.value, start.head)
    else:
        value_trunk = trunk()
        head = value_head(config.value, _unknowing_head(value_trunk, placement))
    value = ScalarModel(value_trunk, head, histogram=histogram_of(config.value))
    value_parameters = list(value.trunk.decoder.parameters())
    policy_parameters = list(policy.trunk.model.parameters())
    for parameter in [*policy_parameters, *value_parameters]:
        parameter.requires_grad_(True)
    return JointModels(policy, reference, value, policy_parameters, value_parameters)


def _adapters(
    config: PpoConfig, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, placement: Placement
) -> tuple[JointModels, dict[str, RewardModel]]:
    trunk = placement.trunk(config.policy.model, "policy.model")
    rewards = _rewards_beside(trunk, config, sources, tokenizer, placement)
    settings = config.adapters or AdapterSection()
    policy_parameters = trunk.add_adapter("policy", settings)
    trunk.share_below("policy")
    if config.value.start == "reward":
        start = _start_value_from_adapter(sources[0], rewards[sources[0]], trunk)
    else:
        trunk.add_adapter("value", settings)
        start = _unknowing_head(trunk, placement)
    head = value_head(config.value, start)
    value = ScalarModel(trunk, head, adapter="value", histogram=histogram_of(config.value))
    value_parameters = trunk.adapter_parameters("value")
    for parameter in [*policy_parameters, *value_parameters]:
        parameter.requires_grad_(True)
    policy = CausalPolicy(trunk, sampling_rule(config), adapter="policy")
    reference = CausalPolicy(trunk, _reference_rule(config))
    return JointModels(policy, reference, value, policy_parameters, value_parameters), rewards


def _head(
    config: PpoConfig, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, placement: Placement
) -> tuple[JointModels, dict[str, RewardModel]]:
    trunk = placement.trunk(config.policy.model, "policy.model")
    if config.adapters is not None:
        rewards = _rewards_beside(trunk, config, sources, tokenizer, placement)
        adapter, parameters, reference_trunk = "policy", trunk.add_adapter("policy", config.adapters), trunk
        trunk.share_below("policy")
    else:
        rewards = {source: load_reward(source, reward_key(config, source), placement) for source in sources}
        adapter, parameters = None, list(trunk.model.requires_grad_(True).parameters())
        reference_trunk = placement.trunk(config.policy.model, "policy.model")
    policy = CausalPolicy(trunk, sampling_rule(config), adapter)
    head = value_head(config.value, _unknowing_head(trunk, placement))
    value = ScalarModel(trunk, head, adapter, histogram_of(config.value))
    reference = CausalPolicy(reference_trunk, _reference_rule(config))
    return JointModels(policy, reference, value, parameters, [], PolicyWithValueHead(policy, value)), rewards


def _rewards_beside(
    trunk: Trunk,
    config: PpoConfig,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement,
) -> dict[str, RewardModel]:
    """Reward models as adapters of the policy's trunk where they are such, else as models of their own."""
    return {
        source: _reward_on_trunk(source, f"reward{index}", config.policy.model, trunk, tokenizer, placement)
        or load_reward(source, reward_key(config, source), placement)
        for index, source in enumerate(sources)
    }


def _unknowing_head(trunk: Trunk, placement: Placement) -> nn.Linear:
    check_classifier(trunk.model)
    return zero_head(trunk.model.config.get_text_config().hidden_size, placement.device)


def histogram_of(settings: ValueSection) -> Histogram | None:
    return None if settings.histogram is None else Histogram(**settings.histogram.model_dump())


def value_head(settings: ValueSection, start: nn.Linear) -> nn.Linear:
    """The value model's head: as the start's, with a bias where returns are normalised; a histogram starts at 0."""
    device = start.weight.device
    histogram = histogram_of(settings)
    if histogram is not None:
        head = zero_head(start.in_features, device, outputs=histogram.bins, bias=True)
        with torch.no_grad():
            head.bias.copy_(histogram.probabilities(torch.zeros(())).clamp(min=1e-4).log())
        return head
    head = zero_head(start.in_features, device, bias=settings.normalize or start.bias is not None)
    with torch.no_grad():
        head.weight.copy_(start.weight)
        if start.bias is not None:
            head.bias.copy_(start.bias)
    return head


def _start_value_from_adapter(source: str, reward: RewardModel, trunk: Trunk) -> nn.Linear:
    """Give the value adapter the reward adapter's weights; returns the head to start from."""
    scorer = reward.scorer
    if not isinstance(scorer, DecoderScorer) or scorer.model.trunk is not trunk or reward.card is None:
        raise InputError(
            f'value.start = "reward" with sharing.mode = "adapters" needs a reward model that is an adapter of '
            f"policy.model, and {source!r} is none; train it with `tandem reward` and an [adapters] section, or "
            f'set value.start = "policy" or sharing.mode = "separate".'
        )
    assert reward.card.adapter is not None
    assert scorer.model.adapter is not None
    trunk.add_adapter("value", reward.card.adapter)
    trunk.copy_adapter(scorer.model.adapter, "value")
    return scorer.model.head


def _reward_on_trunk(
    source: str,
    name: str,
    policy_model: str,
    trunk: Trunk,
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement,
) -> RewardModel | None:
    """The reward model as an adapter of the policy's trunk, where it was trained as one of the same base.

    Raises InputError where the base has the same name but the adapter answers differently on it.
    """
    card = read_card(source)
    folder = Path(source) / ADAPTER_FOLDER
    if card is None or card.adapter is None or not folder.is_dir() or not _same_source(card.base, policy_model):
        return None
    check_same_tokenizer(source, tokenizer, placement)
    head = load_adapter(trunk, name, card.adapter, folder)
    scorer = DecoderScorer(ScalarModel(trunk, head, adapter=name), placement.tokens_per_microbatch)
    _compare(source, card, scorer, placement)
    return RewardModel(scorer, tokenizer, card, context_length(trunk.model))


def _same_source(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


def reward_key(config: PpoConfig, source: str) -> str:
    """What a recipe calls the first reward that is this model."""
    return next(f"rewards.{number}.model" for number, one in enumerate(config.rewards) if one.model == source)


def load_reward(source: str, key: str, placement: Placement) -> RewardModel:
    """A reward model by itself. Raises InputError where it cannot be loaded or is no one-label classifier."""
    tokenizer = placement.tokenizer(source, key)
    found, budget = placement.classifier(source, key), placement.tokens_per_microbatch
    if isinstance(found, ScalarModel):
        decoder = found.trunk.model
        return RewardModel(DecoderScorer(found, budget), tokenizer, read_card(source), context_length(decoder))
    scorer = ClassifierScorer(found, _padding(f"{key} = {source!r}", tokenizer, found), budget)
    return RewardModel(scorer, tokenizer, read_card(source), context_length(found))


def _padding(named: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """An encoder is told by its attention mask what is padding; any id that it knows will do."""
    known = padding_id(tokenizer, model)
    if known is None:
        raise InputError(f"{named}: its tokenizer has neither a padding nor an EOS token; give it one of them.")
    return known


def _decoder_with_head(source: str, key: str, placement: Placement) -> ScalarModel:
    model = placement.classifier(source, key)
    if not isinstance(model, ScalarModel):
        raise InputError(
            f'value.start = "reward": {source!r} ({type(model).__name__}) is no causal decoder with a scalar head, '
            'so it cannot read the policy\'s tokens one by one; set value.start = "policy".'
        )
    return model


def check_same_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase, placement: Placement) -> None:
    """Raises InputError where the reward model's tokens do not mean what the policy's do."""
    other = placement.tokenizer(source, "the reward model")
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f'value.start = "reward": {source!r} has another tokenizer than policy.model, and the value model reads '
            'the policy\'s tokens; set value.start = "policy" (the reward model may keep its tokenizer).'
        )


def _verify_transfer(source: str, value: ScalarModel, placement: Placement) -> None:
    """The value model must answer as the reward model did: by its card, or else by its own forward."""
    card = read_card(source)
    scorer = DecoderScorer(value, placement.tokens_per_microbatch)
    if card is not None and card.probes:
        _compare(source, card, scorer, placement)
        return
    model = value.trunk.model
    texts = [list(range(5, 5 + length)) for length in (3, 7)]
    own = ClassifierScorer(model, 0, placement.tokens_per_microbatch)
    expected = torch.cat([value.trunk.run(partial(own.score, [text])) for text in texts])
    _same_or_refuse(source, scorer.score(texts), expected, placement)


def _compare(source: str, card: RewardCard, scorer: Scorer, placement: Placement) -> None:
    found = probe_scores(scorer, card)
    _same_or_refuse(source, found, torch.tensor([probe.score for probe in card.probes]), placement)


def _same_or_refuse(source: str, found: torch.Tensor, expected: torch.Tensor, placement: Placement) -> None:
    tolerance = 1e-3 if placement.dtype == torch.float32 else 0.1
    gap = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not gap <= tolerance * scale:
        raise InputError(
            f"the reward model {source!r} was not carried over whole: on its own probe texts it scores up to "
            f"{gap:.3g} apart from what it scored when it was saved. Was it trained from another base model?"
        )
