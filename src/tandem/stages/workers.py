"""What samples and scores for a joint run in processes of their own; the run sees a generator and reward terms."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
from tandem.models.sharing import Placement, load_reward, reward_key, sampling_rule
from tandem.models.source import positions
from tandem.rewards.composition import Earned, Term
from tandem.rewards.function import load_function
from tandem.rollout import TorchGenerator, VllmGenerator
from tandem.rollout.stopping import Stopping
from tandem.rollout.torch_generator import draw_uniform, groups_by_length
from tandem.rollout.vllm_generator import draw_seeds
from tandem.run.quiet import quiet_libraries
from tandem.stages.joint_setup import reward_terms
from tandem.stages.sampling import make_engine, make_generator
from tandem.stages.together import by_first
from tandem.text import decoder
from tandem.types import Prompt, Rollout
from tandem.world import World, world


@dataclass(frozen=True)
class Asked:
    """Prompts to answer together, and the chance in each answer: a row each."""

    prompts: Sequence[Prompt]
    chance: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


class GeneratorWorker:
    """Samples with a copy of the policy, in a process of its own."""

    def __init__(self, config: PpoConfig, folder: str) -> None:
        self._config, self._folder = config, folder
        self._number: int | None = None
        self._kept = ExitStack()
        self._keep: Callable[[], AbstractContextManager[None]] = nullcontext

    def prepare(self) -> None:
        """Load the policy as the recipe names it. Raises InputError where it cannot be loaded here."""
        config, placement = self._config, at_home(self._config, self._folder)
        tokenizer = placement.tokenizer(config.policy.model, "policy.model")
        policy = CausalPolicy(placement.trunk(config.policy.model, "policy.model"), sampling_rule(config))
        random = torch.Generator(device=placement.device)
        if config.rollout.generator == "torch":
            self._keep = policy.gathered
            self._generator: TorchGenerator | VllmGenerator = make_generator(
                policy, tokenizer, config.rollout, random, load=policy.load_weights
            )
            return
        engine = make_engine(policy, config, longest_sequence(config, policy))
        self._generator = VllmGenerator(engine, decoder(tokenizer), policy.stop_ids(tokenizer), random)

    def answer(self, sent: Sent, asked: Asked) -> list[Rollout]:
        """Responses under these weights, which are fetched if they are not here yet. Cut short, that leaves none.

        What is laid out anew to sample from weights is kept until others come.
        """
        if sent.number != self._number:
            self._number = None
            self._kept.close()
            self._generator.load_weights(receive(sent), sent.number)
            self._kept.enter_context(self._keep())
            self._number = sent.number
        return self._generator.answer(asked.prompts, asked.chance)


def longest_sequence(config: PpoConfig, policy: CausalPolicy) -> int:
    """Tokens of the longest prompt and response that the recipe allows and the model reads."""
    wanted = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return min(wanted, positions(policy.trunk.model.config) or wanted)


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
    return Placement.of(config.compute, lambda _: None)


class RayWorkers:
    """Workers over a Ray cluster. They belong to the process that makes them, and end with it.

    Of several processes that train together all make this, and the first one has the workers: it tells the others what
    they answered. `warn` is told of losses.
    """

    def __init__(self, config: PpoConfig, placed: Placed, run: Path, warn: Callable[[str], None]) -> None:
        assert config.cluster is not None
        self._settings: ClusterSection = config.cluster
        self._rollout = config.rollout
        self._numbers = itertools.count(1)
        self._run = run
        self._events = Events(run)
        patience = Patience(self._settings.late_after, self._settings.silent_seconds)
        folder, here = str(Path.cwd()), world().first

        def pool(role: Any, count: int, kind: type) -> Pool:
            def start(number: int) -> Any:
                return ray().remote(kind).options(**placed.options(role, number)).remote(config, folder)

            return Pool(role, count if here else 0, start, patience, self._events, warn)

        self.generators = pool("generator", self._settings.generators, GeneratorWorker)
        self.scorers = pool("reward worker", self._settings.reward_workers, RewardWorker)
        # With a staleness of 1 a thread beside training samples, and tells the others too.
        self._sampling = world().apart()

    def generator(self, random: torch.Generator) -> PooledGenerator:
        """One that draws the chance in responses from `random`, as the recipe's generator in one process does."""

        def draw(count: int) -> Tensor:
            if self._rollout.generator == "vllm":
                return draw_seeds(count, random)
            return draw_uniform(count, self._rollout.max_new_tokens, random)

        return PooledGenerator(self.generators, draw, self._settings.samples_per_task, self._numbers, self._sampling)

    def spread(self, terms: Mapping[str, Term]) -> dict[str, Term]:
        if self._settings.reward_workers == 0:
            return dict(terms)
        size = self._settings.samples_per_task
        spread = {name: by_first(PooledScorer(self.scorers, name, size)) for name in terms}
        return {name: Term(spread[name], term.weight) for name, term in terms.items()}

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
    """A generator that spreads prompts over the generators of a pool.

    Each response has its chance drawn for it, as in one process. So what is sampled does not depend on how many
    generators there are, which of them answers, or whether one dies. All of `together` do the same with theirs at the
    same time: they draw the same chance, and the first of them, which has the pool, tells the others the responses.
    """

    def __init__(
        self,
        pool: Pool,
        draw: Callable[[int], Tensor],
        samples_per_task: int,
        numbers: Iterator[int],
        together: World,
    ) -> None:
        self._pool, self._draw, self._size, self._numbers = pool, draw, samples_per_task, numbers
        self._together = together
        self._sent: Sent | None = None
        self._stopping = Stopping()
        self.version = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from these weights from now on: generators fetch them with their next task.

        Weights that are cut over several processes are gathered one by one, so all go through them.
        """
        self._sent, self.version = None, version
        if self._together.first:
            self._sent = send(weights, next(self._numbers))
        else:
            for _ in weights:
                pass

    def stop(self) -> None:
        """Let a `generate` in another thread end soon, by raising GivenUp."""
        self._stopping.ask()

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response for each prompt, in their order; the longest prompts are handed out first."""
        chance = self._draw(len(prompts)).cpu()
        return self._together.from_first(lambda: self._spread(prompts, chance))

    def _spread(self, prompts: Sequence[Prompt], chance: Tensor) -> list[Rollout]:
        sent = self._sent
        groups = groups_by_length(prompts, self._size)[::-1]
        asked = [Asked([prompts[row] for row in group], chance[group]) for group in groups]
        answers = self._pool.run(asked, lambda process, one: process.answer.remote(sent, one), self._stopping.check)
        found = {
            row: rollout
            for group, rollouts in zip(groups, answers, strict=True)
            for row, rollout in zip(group, rollouts, strict=True)
        }
        return [found[row] for row in range(len(prompts))]


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
