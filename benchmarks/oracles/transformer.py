"""The real machinery on a task that can be enumerated: a Llama of 2 layers, the default generator, EOS and all.

Four tokens and EOS, at most `horizon` tokens a response: 85 responses in all for three, 1,365 for five. The reference
is the policy as it starts, its output matrix drawn wide enough to have preferences of its own; every response has a
reward from N(0, 1). KL(pi || pi*) is computed over all responses from the log-probabilities of the training forward.

The rewards have no pattern, so the policy must know them by heart. `fit_exactly` tells how near a Llama of this size
comes when it is given the exact gradient over all responses at once: what sampling cannot better.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from oracles.training import OracleModels, nested
from tandem.config import OptimizerSection, PpoConfig
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.scalar import ScalarModel, zero_head
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.stages.state import start_state
from tandem.stages.step import judge, learn
from tandem.stages.update import PolicyLearner, ValueLearner
from tandem.types import Prompt, Rollout, Scores, pad_tokens

TOKENS, EOS, BETA = 4, 4, 0.5
LR = 3e-3
PROMPT = Prompt(ids=(0,), text="", messages=None, row={})


def small_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TOKENS + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.125)
    return model


def all_responses(horizon: int) -> list[tuple[int, ...]]:
    """Every response: fewer tokens than the horizon and EOS, or as many tokens."""
    short = [(*tokens, EOS) for length in range(horizon) for tokens in itertools.product(range(TOKENS), repeat=length)]
    return short + list(itertools.product(range(TOKENS), repeat=horizon))


@dataclass(frozen=True)
class Enumeration:
    """Rewards and the optimum over all responses."""

    responses: list[tuple[int, ...]]
    rewards: dict[tuple[int, ...], float]
    optimal_logprobs: Tensor

    def gap(self, policy: CausalPolicy) -> Tensor:
        """KL(pi || pi*) in nats."""
        logprobs = response_logprobs(policy, self.responses)
        return (logprobs.exp() * (logprobs - self.optimal_logprobs)).sum()


def response_logprobs(policy: CausalPolicy, responses: list[tuple[int, ...]]) -> Tensor:
    """log pi(y) of every response by the training forward."""
    tokens = pad_tokens([PROMPT.ids] * len(responses), responses)
    return policy.logprobs(tokens).double().sum(1)


@torch.no_grad()
def enumerate_all(reference: CausalPolicy, seed: int, horizon: int) -> Enumeration:
    responses = all_responses(horizon)
    rewards = torch.randn(len(responses), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = response_logprobs(reference, responses) + rewards / BETA
    return Enumeration(responses, dict(zip(responses, rewards.tolist(), strict=True)), weights.log_softmax(0))


def fit_exactly(seed: int, steps: int, horizon: int) -> float:
    """KL(pi || pi*) after so many updates by its exact gradient: what the model and the optimiser allow."""
    policy = CausalPolicy(Trunk(small_llama(seed).requires_grad_(True)), FULL_DISTRIBUTION)
    reference = CausalPolicy(Trunk(small_llama(seed).requires_grad_(False)), FULL_DISTRIBUTION)
    exact = enumerate_all(reference, seed=0, horizon=horizon)
    engine = _engine(policy.trunk.model.parameters(), OptimizerSection(lr=LR, schedule="linear"))
    for step in range(steps):
        engine.set_progress(step, steps)
        engine.backward(exact.gap(policy))
        engine.step()
    with torch.no_grad():
        return float(exact.gap(policy))


@dataclass(frozen=True)
class TransformerResult:
    """KL(pi || pi*) before and after, how far all probabilities are from 1 in sum, and the steps' metrics."""

    start_gap: float
    gap: float
    mass_error: float
    metrics: list[dict[str, float]]


def train_transformer(seed: int, steps: int, horizon: int, episodes: int = 512) -> TransformerResult:
    config = PpoConfig.model_validate(
        nested(
            {
                "steps": steps,
                "data.prompts": "none",
                "rewards": [{"function": "none:none"}],
                "kl.coefficient": BETA,
                "policy.model": "llama",
                "value.start": "policy",
                **{
                    f"{side}.{name}": value
                    for side in ("policy", "value")
                    for name, value in {
                        "lr": LR,
                        "schedule": "linear",
                        "epochs": 4,
                        "sequences_per_minibatch": episodes // 4,
                    }.items()
                },
            }
        )
    )
    policy = CausalPolicy(Trunk(small_llama(seed).requires_grad_(True)), FULL_DISTRIBUTION)
    reference = CausalPolicy(Trunk(small_llama(seed).requires_grad_(False)), FULL_DISTRIBUTION)
    value = ScalarModel(Trunk(small_llama(seed + 1).requires_grad_(True)), zero_head(64, torch.device("cpu")))
    exact = enumerate_all(reference, seed=0, horizon=horizon)
    of_value = [*value.trunk.decoder.parameters(), *value.head.parameters()]
    learners = (
        PolicyLearner(policy, _engine(policy.trunk.model.parameters(), config.policy), config.policy),
        ValueLearner(value, _engine(of_value, config.value), config.value),
    )
    random = torch.Generator().manual_seed(seed)
    generator = TorchGenerator(
        policy,
        lambda _, ids: " ".join(map(str, ids)),
        {EOS},
        max_new_tokens=horizon,
        sequences_per_batch=episodes,
        random=random,
    )
    models = OracleModels(learners, policy, reference, value, random)
    state, metrics, start_gap = start_state(config), [], gap_of(policy, exact)
    while not state.finished:
        rollouts = generator.generate([PROMPT] * episodes)
        scores = score(rollouts, exact)
        state, found = learn(models, config, state, judge(models, config, state, rollouts, scores))
        metrics.append(found)
    with torch.no_grad():
        mass = float(response_logprobs(policy, exact.responses).exp().sum())
    return TransformerResult(start_gap, gap_of(policy, exact), abs(mass - 1), metrics)


@torch.no_grad()
def gap_of(policy: CausalPolicy, exact: Enumeration) -> float:
    return float(exact.gap(policy))


def score(rollouts: list[Rollout], exact: Enumeration) -> Scores:
    return Scores(torch.tensor([exact.rewards[rollout.ids] for rollout in rollouts]), {})


def _engine(parameters, settings) -> LocalEngine:
    return LocalEngine([ParameterGroup(list(parameters), settings.lr)], settings)
