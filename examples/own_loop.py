"""The joint loop by hand, on a tiny random model: sample, score, evaluate, estimate, update.

The reward here is the share of a response's tokens that are even numbers: silly, exact, and learnt in seconds.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.config import AdapterSection, AdvantageSection, OptimizerSection
from tandem.engine import LocalEngine
from tandem.engine.local import ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.scalar import ScalarModel, zero_head
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.stages.joint import PolicyLearner, ValueLearner, estimate_advantages, evaluate, measure, update
from tandem.types import Prompt, Scores

STEPS, BUDGET = 20, 4096
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


def engine(parameters, lr: float) -> LocalEngine:
    return LocalEngine([ParameterGroup(list(parameters), lr)], OptimizerSection(lr=lr), updates=STEPS * 4)


learners = (
    PolicyLearner(
        policy,
        engine(policy_parameters, 3e-2),
        epochs=4,
        sequences_per_minibatch=64,
        clip_low=0.2,
        clip_high=0.2,
    ),
    ValueLearner(
        value,
        engine([*value_parameters, *value.head.parameters()], 1e-2),
        epochs=4,
        sequences_per_minibatch=64,
    ),
)
generator = TorchGenerator(
    policy, lambda _, ids: " ".join(map(str, ids)), {1}, max_new_tokens=12, sequences_per_batch=64, random=random
)
prompts = [Prompt(ids=(2, number), text="", messages=None, row={}) for number in range(3, 35)] * 2

for step in range(1, STEPS + 1):
    rollouts = generator.generate(prompts)
    scores = Scores(torch.tensor([sum(t % 2 == 0 for t in r.ids) / len(r.ids) for r in rollouts]), {})
    trajectories = evaluate(rollouts, scores, policy, reference, value, BUDGET)
    batch = estimate_advantages(trajectories, AdvantageSection(), kl_coefficient=0.01)
    metrics = measure(trajectories, batch, scores, AdvantageSection(), 0.01) | update(*learners, batch, BUDGET, random)
    names = ("objective/score", "objective/kl", "value/explained_variance")
    print(f"step {step:2d}  " + "  ".join(f"{name} {metrics[name]:.3f}" for name in names))
