"""What is run: healthy runs of different tasks, and every fault on purpose.

A fault names the rules that may call it by its name. On the story model a run has 40 steps and on a table 300; of a
fault only the first quarter is run, at a constant learning rate, since that is where it must be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Patch = Literal["noisy", "stale", "foreign"]


@dataclass(frozen=True)
class Story:
    """A run of the story model, whose responses never end by themselves: recipe lines, the reward's name, and what is
    done to the generator."""

    words: tuple[str, ...] = ()
    reward: str = "happy"
    patch: Patch | None = None


@dataclass(frozen=True)
class Table:
    """A run of tables: which task, settings by dotted name, where the values start, what is done to it."""

    task: Literal["tree", "counter"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    value_start: float = 0.0
    anchor_moves: bool = False
    score: Literal["task", "constant", "inflating", "short", "long", "hacked"] = "task"
    patch: Patch | None = None


@dataclass(frozen=True)
class Case:
    """`rules` are those that name the fault; none for a healthy run."""

    name: str
    run: Story | Table
    rules: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return "stories" if isinstance(self.run, Story) else "tables"


TD0 = {"advantage.lambda_policy": 0.0, "advantage.lambda_value": 0.0}
HISTOGRAM = {"value.loss": "hl_gauss", "value.histogram": {"low": -4.0, "high": 4.0, "bins": 41}}
HEAD = ("--sharing.mode=head", "--value.epochs=1", "--value.schedule=constant", "--sharing.gradient_cosine_every=1")

HEALTHY = [
    Case("tree", Table("tree")),
    Case("tree, lambda 1", Table("tree", {"advantage.lambda_policy": 1.0})),
    Case("tree, whitened", Table("tree", {"advantage.whiten": True})),
    Case("tree, A2C", Table("tree", {"policy.loss": "a2c", "policy.epochs": 1, "policy.lr": 0.1})),
    Case("tree, categorical values", Table("tree", HISTOGRAM)),
    Case("tree, normalised returns", Table("tree", {"value.normalize": True})),
    Case("tree, batch baseline", Table("tree", {"advantage.baseline": "batch"})),
    Case("counter", Table("counter")),
    Case("counter, lambda .95 / .95", Table("counter", {"advantage.lambda_value": 0.95})),
    Case("counter, adaptive baseline", Table("counter", {"advantage.baseline": "adaptive"})),
    Case("stories", Story()),
    Case("stories, lambda_value .95", Story(("--advantage.lambda_value=0.95",))),
    Case("stories, whitened", Story(("--advantage.whiten=true",))),
    Case("stories, A2C", Story(("--policy.loss=a2c",))),
    Case("stories, adapters", Story(("--sharing.mode=adapters", "--policy.lr=3e-3", "--value.lr=3e-3"))),
    Case("stories, warm-up", Story(("--value.warmup.steps=8",))),
    Case("stories, four to a prompt", Story(("--rollout.prompts_per_step=16", "--rollout.responses_per_prompt=4"))),
    Case("stories, adaptive baseline", Story(("--advantage.baseline=adaptive",))),
]

FAULTS = [
    # The value model.
    Case("value learning rate far too high", Table("counter", {"value.lr": 5.0}), ("critic_worse_than_baseline",)),
    Case(
        "value head's rate far too high, on the policy's trunk",
        Story((*HEAD, "--value.head_lr=0.05")),
        ("critic_worse_than_baseline",),
    ),
    Case("value model does not learn", Table("tree", {"value.lr": 1e-9}), ("critic_dead",)),
    Case("value model does not learn", Story(("--value.lr=1e-9",)), ("critic_dead",)),
    Case("values start at 3", Table("counter", value_start=3.0), ("value_start_biased",)),
    Case("scores around 8, values at 0", Story(reward="happy_far_off"), ("value_start_biased",)),
    Case("value model learns too slowly", Table("counter", {"value.lr": 2e-4}, 0.5), ("critic_lags",)),
    Case(
        "value model learns too slowly",
        Story(("--value.lr=1e-5", "--value.epochs=1", "--policy.lr=1e-3")),
        ("critic_lags",),
    ),
    Case("scores inflate", Table("tree", score="inflating"), ("return_scale_drifts",)),
    Case("scores inflate", Story(reward="happy_inflating"), ("return_scale_drifts",)),
    Case("TD(0) over 32 tokens", Table("counter", TD0), ("signal_decays",)),
    Case(
        "TD(0) over 32 tokens", Story(("--advantage.lambda_policy=0", "--advantage.lambda_value=0")), ("signal_decays",)
    ),
    # The reference.
    Case("no KL", Table("tree", {"kl.coefficient": 0.0}), ("kl_does_not_bite",)),
    Case("the book's penalty", Table("tree", {"preset": "book"}), ("kl_does_not_bite",)),
    Case(
        "no KL, in a hurry",
        Story(("--kl.coefficient=0", "--policy.lr=3e-3"), "exclaimed"),
        ("kl_does_not_bite",),
    ),
    Case("the reference moves along", Table("tree", anchor_moves=True), ("kl_reads_zero",)),
    Case("sampled from the reference, said to be the policy's", Table("tree", patch="foreign"), ("kl_negative",)),
    Case("sampled from the reference, said to be the policy's", Story(patch="foreign"), ("kl_negative",)),
    # Updates.
    Case("policy learning rate far too high", Table("tree", {"policy.lr": 3.0}), ("updates_too_large",)),
    Case("policy learning rate far too high", Story(("--policy.lr=2e-2",)), ("updates_too_large",)),
    Case(
        "value loss drowns the policy's on a shared trunk",
        Story((*HEAD, "--value.coefficient=100")),
        ("gradient_conflict",),
    ),
    # Stagnation.
    Case("every response earns the same", Table("tree", score="constant"), ("no_signal",)),
    Case("every response earns the same", Story(reward="constant"), ("no_signal",)),
    Case("policy learning rate far too low", Table("tree", {"policy.lr": 1e-7}), ("learning_rate_too_small",)),
    Case("policy learning rate far too low", Story(("--policy.lr=1e-9",)), ("learning_rate_too_small",)),
    Case("KL coefficient far too high", Table("tree", {"kl.coefficient": 20.0}), ("kl_too_strong",)),
    Case("KL coefficient far too high", Story(("--kl.coefficient=5",)), ("kl_too_strong",)),
    # Text.
    Case("no KL, a peaked reward", Table("tree", {"kl.coefficient": 0.0, "policy.lr": 0.3}), ("entropy_collapse",)),
    Case(
        "no KL, a peaked reward",
        Story(("--kl.coefficient=0", "--policy.lr=3e-3"), "words_again"),
        ("entropy_collapse",),
    ),
    Case("a reward for repetition", Story(("--kl.coefficient=0", "--policy.lr=2e-3"), "words_again"), ("repetition",)),
    Case("a reward for brevity", Table("counter", score="short"), ("length_collapse",)),
    Case("a reward for length", Table("counter", score="long"), ("length_runaway", "no_end")),
    # The reward.
    Case("a proxy against its gold measure", Table("tree", score="hacked"), ("reward_hacking",)),
    Case(
        "exclamation marks for stories",
        Story(
            (
                "--kl.coefficient=0",
                "--policy.lr=2e-3",
                "--rewards.1.function={rewards}:different_words",
                "--rewards.1.weight=0",
            ),
            "exclaimed",
        ),
        ("reward_hacking",),
    ),
    # The generator.
    Case("a generator of another arithmetic", Table("tree", patch="noisy"), ("generator_mismatch",)),
    Case("a generator of another arithmetic", Story(patch="noisy"), ("generator_mismatch",)),
    Case("a generator with old weights", Table("tree", patch="stale"), ("stale_rollouts",)),
    Case("a generator with old weights", Story(patch="stale"), ("stale_rollouts",)),
    # The machine.
    Case("a policy that overflows", Story(("--policy.lr=1e30", "--run.max_faults_in_a_row=100")), ("not_finite",)),
    Case("a reward that keeps memory", Story(reward="happy_and_leaking"), ("memory_grows",)),
    Case("a reward that grows slower", Story(reward="happy_and_tiring"), ("throughput_falls",)),
]
