"""The real machinery on a task that can be enumerated: a Llama of 2 layers, the default generator, EOS and all.

Four tokens and EOS, at most five tokens a response: 1,365 responses in all. The reference is the policy as it
starts, its output matrix drawn wide enough to have preferences of its own; every response has a reward from N(0, 1).
KL(pi || pi*) is computed over all responses from the log-probabilities of the training forward.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from oracles.training import OracleModels, nested
from tandem.config import PpoConfig
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.scalar import ScalarModel, zero_head
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.stages.joint import in_parts
from tandem.stages.state import start_state
from tandem.stages.step import judge, learn
from tandem.stages.update import PolicyLearner, ValueLearner
from tandem.types import Prompt, Rollout, Scores, pad_tokens

TOKENS, EOS, HORIZON, BETA = 4, 4, 5, 0.5
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


def all_responses() -> list[tuple[int, ...]]:
    """Every response: up to four tokens and EOS, or five tokens."""
    short = [(*tokens, EOS) for length in range(HORIZON) for tokens in itertools.product(range(TOKENS), repeat=length)]
    return short + list(itertools.product(range(TOKENS), repeat=HORIZON))


@dataclass(frozen=True)
class Enumeration:
    """Rewards and the optimum over all responses, [1365] each."""

    rewards: dict[tuple[int, ...], float]
    optimal_logprobs: Tensor

    def gap(self, policy: CausalPolicy) -> float:
        """KL(pi || pi*) in nats."""
        logprobs = response_logprobs(policy)
        return float((logprobs.exp() * (logprobs - self.optimal_logprobs)).sum())


@torch.no_grad()
def response_logprobs(policy: CausalPolicy) -> Tensor:
    """log pi(y) of every response by the training forward."""
    responses = all_responses()
    tokens = pad_tokens([PROMPT.ids] * len(responses), responses)
    return in_parts(policy.logprobs, tokens, 4096).double().sum(1)


def enumerate_all(reference: CausalPolicy, seed: int) -> Enumeration:
    responses = all_responses()
    rewards = torch.randn(len(responses), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = response_logprobs(reference) + rewards / BETA
    return Enumeration(dict(zip(responses, rewards.tolist(), strict=True)), weights.log_softmax(0))


@dataclass(frozen=True)
class TransformerResult:
    """KL(pi || pi*) before and after, how far all probabilities are from 1 in sum, and the steps' metrics."""

    start_gap: float
    gap: float
    mass_error: float
    metrics: list[dict[str, float]]


def train_transformer(seed: int, steps: int, episodes: int = 512) -> TransformerResult:
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
                        "lr": 1e-3,
                        "schedule": "linear",
                        "epochs": 2,
                        "sequences_per_minibatch": episodes // 2,
                    }.items()
                },
            }
        )
    )
    policy = CausalPolicy(Trunk(small_llama(seed).requires_grad_(True)), FULL_DISTRIBUTION)
    reference = CausalPolicy(Trunk(small_llama(seed).requires_grad_(False)), FULL_DISTRIBUTION)
    value = ScalarModel(Trunk(small_llama(seed + 1).requires_grad_(True)), zero_head(64, torch.device("cpu")))
    exact = enumerate_all(reference, seed=0)
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
        max_new_tokens=HORIZON,
        sequences_per_batch=episodes,
        random=random,
    )
    models = OracleModels(learners, policy, reference, value, random)
    state, metrics, start_gap = start_state(config), [], exact.gap(policy)
    while not state.finished:
        rollouts = generator.generate([PROMPT] * episodes)
        scores = score(rollouts, exact)
        state, found = learn(models, config, state, judge(models, config, state, rollouts, scores))
        metrics.append(found)
    mass = float(response_logprobs(policy).exp().sum())
    return TransformerResult(start_gap, exact.gap(policy), abs(mass - 1), metrics)


def score(rollouts: list[Rollout], exact: Enumeration) -> Scores:
    return Scores(torch.tensor([exact.rewards[rollout.ids] for rollout in rollouts]), {})


def _engine(parameters, settings) -> LocalEngine:
    return LocalEngine([ParameterGroup(list(parameters), settings.lr)], settings)
