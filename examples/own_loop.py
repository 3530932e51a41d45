"""The joint loop by hand, on a tiny random model: sample, score, evaluate, estimate, update.

The reward here is the share of a response's tokens that are even numbers: silly, exact, and learnt in seconds.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.config import (
    AdapterSection,
    AdvantageSection,
    KlSection,
    OptimizerSection,
    PolicySection,
    ValueSection,
)
from tandem.engine import LocalEngine
from tandem.engine.local import ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.scalar import ScalarModel, zero_head
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.stages.joint import estimate_advantages, evaluate
from tandem.stages.measure import measure
from tandem.stages.update import Course, PolicyLearner, ValueLearner, update
from tandem.types import Prompt, Scores

STEPS, BUDGET = 20, 4096
advantage, kl = AdvantageSection(), KlSection(coefficient=0.01)
torch.manual_seed(0)
random = torch.Generator().manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    eos_token_id=1,
)

# One frozen trunk: with its adapters off it is the reference.
trunk = Trunk(LlamaForCausalLM(config).eval().requires_grad_(False))
lora = AdapterSection(rank=8, alpha=16)
policy_parameters, value_parameters = (trunk.add_adapter(name, lora) for name in ("policy", "value"))
policy, reference = CausalPolicy(trunk, FULL_DISTRIBUTION, "policy"), CausalPolicy(trunk, FULL_DISTRIBUTION)
value = ScalarModel(trunk, zero_head(64, torch.device("cpu")).requires_grad_(), "value")


def engine(parameters, settings: OptimizerSection) -> LocalEngine:
    return LocalEngine([ParameterGroup(list(parameters), settings.lr)], settings)


policy_settings = PolicySection(model="tiny", lr=3e-2, epochs=4, sequences_per_minibatch=64)
value_settings = ValueSection(lr=1e-2, epochs=4, sequences_per_minibatch=64)
learners = (
    PolicyLearner(policy, engine(policy_parameters, policy_settings), policy_settings),
    ValueLearner(value, engine([*value_parameters, *value.head.parameters()], value_settings), value_settings),
)
generator = TorchGenerator(
    policy, lambda _, ids: " ".join(map(str, ids)), {1}, max_new_tokens=12, sequences_per_batch=64, random=random
)
prompts = [Prompt(ids=(2, number), text="", messages=None, row={}) for number in range(3, 35)] * 2

for step in range(1, STEPS + 1):
    rollouts = generator.generate(prompts)
    scores = Scores(torch.tensor([sum(t % 2 == 0 for t in r.ids) / len(r.ids) for r in rollouts]), {})
    trajectories = evaluate(rollouts, scores, policy, reference, value, BUDGET)
    batch = estimate_advantages(trajectories, advantage, kl)
    metrics = measure(trajectories, batch, scores, advantage, kl)
    metrics |= update(*learners, batch, kl, BUDGET, random, Course(step - 1, STEPS))
    names = ("objective/score", "objective/kl", "value/explained_variance")
    print(f"step {step:2d}  " + "  ".join(f"{name} {metrics[name]:.3f}" for name in names))
