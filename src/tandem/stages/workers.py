"""What samples and scores for a joint run in processes of their own; the run sees a generator and reward terms."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.cluster.events import Events, read_events, summed
from tandem.cluster.library import ray
from tandem.cluster.placement import Placed
from tandem.cluster.pool import Patience, Pool
from tandem.cluster.transport import Sent, receive, send
from tandem.config import ClusterSection, PpoConfig
from tandem.errors import InputError
from tandem.models.causal import CausalPolicy
from tandem.models.loading import pick_device, pick_dtype
from tandem.models.sharing import Placement, load_reward, reward_key, sampling_rule
from tandem.models.trunk import Trunk
from tandem.rewards.composition import Earned, Term
from tandem.rewards.function import load_function
from tandem.rollout.keys import Key, draw_call
from tandem.run.quiet import quiet_libraries
from tandem.stages.joint_setup import make_generator, reward_terms
from tandem.types import Prompt, Rollout


@dataclass(frozen=True)
class Asked:
    """Prompts to answer together, with the key of each answer's chance."""

    prompts: Sequence[Prompt]
    keys: Sequence[Key]

    def __len__(self) -> int:
        return len(self.prompts)


class GeneratorWorker:
    """Samples with a copy of the policy, in a process of its own."""

    def __init__(self, config: PpoConfig, folder: str) -> None:
        self._config, self._folder = config, folder
        self._version: int | None = None

    def prepare(self) -> None:
        """Load the policy as the recipe names it. Raises InputError where it cannot be loaded here."""
        config, placement = self._config, at_home(self._config, self._folder)
        tokenizer = placement.tokenizer(config.policy.model, "policy.model")
        trunk = Trunk(placement.causal(config.policy.model, "policy.model"))
        policy = CausalPolicy(trunk, sampling_rule(config))
        self._weights = trunk.model.state_dict()
        self._generator = make_generator(policy, tokenizer, config.rollout, torch.Generator(device=placement.device))

    def answer(self, sent: Sent, asked: Asked) -> list[Rollout]:
        """Responses under these weights, which are fetched if they are not here yet."""
        if sent.version != self._version:
            self.load_weights(receive(sent), sent.version)
        return self._generator.generate(asked.prompts, asked.keys)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over weights under the names of the saved model. Cut short, it leaves no version behind."""
        self._version = None
        with torch.no_grad():
            for name, tensor in weights:
                self._weights[name].copy_(tensor)
        self._version = version


class RewardWorker:
    """Scores with all terms of the reward, in a process of its own."""

    def __init__(self, config: PpoConfig, folder: str) -> None:
        self._config, self._folder = config, folder

    def prepare(self) -> None:
        """Load reward models and functions. Raises InputError where they cannot be loaded here."""
        config, placement = self._config, at_home(self._config, self._folder)
        tokenizer = placement.tokenizer(config.policy.model, "policy.model")
        names = [source.model for source in config.rewards if source.model is not None]
        models = {name: load_reward(name, reward_key(config, name), placement) for name in names}
        functions = {source.function: load_function(source.function) for source in config.rewards if source.function}
        self._terms = reward_terms(config.rewards, models, functions, tokenizer)

    def score(self, name: str, rollouts: Sequence[Rollout]) -> Earned:
        return self._terms[name].score(rollouts)


def at_home(config: PpoConfig, folder: str) -> Placement:
    """Work in the folder where the command was given, on the GPU that this process was given, if any.

    Raises InputError where this machine has no such folder.
    """
    quiet_libraries()
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(
            f"{folder!r}, where the command was given, is not to be found on {os.uname().nodename} ({error.strerror}); "
            "all machines of the cluster must see the run's files under the same path."
        ) from None
    device, compute = pick_device(config.compute.device), config.compute
    dtype = pick_dtype(compute.precision, device)
    return Placement(device, dtype, compute.tokens_per_microbatch, compute.trust_remote_code)


class RayWorkers:
    """Workers over a Ray cluster. They belong to the process that makes them, and end with it."""

    def __init__(self, config: PpoConfig, placed: Placed, run: Path) -> None:
        assert config.cluster is not None
        self._settings: ClusterSection = config.cluster
        self._run = run
        self._events = Events(run)
        patience = Patience(self._settings.late_after, self._settings.silent_seconds)
        folder = str(Path.cwd())

        def pool(role: Any, count: int, kind: type) -> Pool:
            def start(number: int) -> Any:
                return ray().remote(kind).options(**placed.options(role, number)).remote(config, folder)

            return Pool(role, count, start, patience, self._events)

        self.generators = pool("generator", self._settings.generators, GeneratorWorker)
        self.scorers = pool("reward worker", self._settings.reward_workers, RewardWorker)

    def generator(self, policy: CausalPolicy, random: torch.Generator) -> PooledGenerator:
        return PooledGenerator(self.generators, policy, random, self._settings.samples_per_task)

    def spread(self, terms: Mapping[str, Term]) -> dict[str, Term]:
        if self._settings.reward_workers == 0:
            return dict(terms)
        size = self._settings.samples_per_task
        return {name: Term(PooledScorer(self.scorers, name, size), term.weight) for name, term in terms.items()}

    def begin_step(self, number: int) -> None:
        self._events.begin(number)

    def metrics(self) -> dict[str, float]:
        counts = self._events.take_counts()
        found = {
            "cluster/generators": self.generators.alive,
            "cluster/restarts": counts["worker lost"],
            "cluster/lost_samples": counts["lost_samples"],
            "cluster/given_twice": counts["given twice"],
        }
        if self._settings.reward_workers:
            found["cluster/reward_workers"] = self.scorers.alive
        return {name: float(count) for name, count in found.items()}

    def summary(self) -> dict[str, Any]:
        return {
            "generators": self._settings.generators,
            "reward_workers": self._settings.reward_workers,
            **summed(read_events(self._run)),
        }


class PooledGenerator:
    """A generator that spreads prompts over the generators of a pool, longest first.

    Each call sends the policy's weights as they are. What is sampled follows from the random state alone: not from how
    many generators there are, which of them answers, or whether one dies.
    """

    def __init__(self, pool: Pool, policy: CausalPolicy, random: torch.Generator, samples_per_task: int) -> None:
        self._pool, self._policy, self._random, self._size = pool, policy, random, samples_per_task
        self._sent: Sent | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Let the generators sample from these weights from now on; each fetches them with its next task."""
        self._sent = send(weights, version)

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response for each prompt, in their order."""
        call = draw_call(self._random)
        self.load_weights(self._policy.weights(), call)
        sent = self._sent
        return in_groups(
            prompts,
            call,
            self._size,
            lambda groups: self._pool.run(groups, lambda process, asked: process.answer.remote(sent, asked)),
        )


def in_groups(
    prompts: Sequence[Prompt], call: int, size: int, answer: Callable[[Sequence[Asked]], Sequence[Sequence[Rollout]]]
) -> list[Rollout]:
    """Responses to prompts, in their order, asked for in groups of prompts of similar length, the longest first.

    A response may differ in the last bits of its logits with what is decoded beside it, so the groups follow from the
    prompts alone.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    asked = [Asked([prompts[i] for i in group], [(call, i) for i in group]) for group in groups]
    rollouts: dict[int, Rollout] = {}
    for group, answers in zip(groups, answer(asked), strict=True):
        rollouts |= dict(zip(group, answers, strict=True))
    return [rollouts[index] for index in range(len(prompts))]


class PooledScorer:
    """A term of the reward that the workers of a pool score, a few samples at a time."""

    def __init__(self, pool: Pool, name: str, samples_per_task: int) -> None:
        self._pool, self._name, self._size = pool, name, samples_per_task

    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        parts = [rollouts[start : start + self._size] for start in range(0, len(rollouts), self._size)]
        return joined(self._pool.run(parts, lambda process, part: process.score.remote(self._name, part)))


def joined(parts: Sequence[Earned]) -> Earned:
    """What groups of samples earned, as if they had been scored together."""
    starts = [sum(len(part.final) for part in parts[:number]) for number in range(len(parts))]
    missing = frozenset(start + row for start, part in zip(starts, parts, strict=True) for row in part.missing)
    fault = next((part.fault for part in parts if part.fault is not None), None)
    return Earned(torch.cat([part.final for part in parts]), _joined_process(parts), missing, fault)


def _joined_process(parts: Sequence[Earned]) -> Tensor | None:
    widths = [part.process.shape[1] for part in parts if part.process is not None]
    if not widths:
        return None
    rows = [torch.zeros(len(part.final), max(widths)) for part in parts]
    for row, part in zip(rows, parts, strict=True):
        if part.process is not None:
            row[:, : part.process.shape[1]] = part.process
    return torch.cat(rows)
