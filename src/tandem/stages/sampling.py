"""Where a step's responses come from: who samples them, from which weights, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tandem.config import Gather, PpoConfig, SamplingSection, VllmSection, gathers_by_layer
from tandem.data.feed import Feed, Place
from tandem.models.causal import CausalPolicy
from tandem.rollout import Generator, InStep, TorchGenerator, VllmEngine, VllmGenerator
from tandem.run.machine import free_memory
from tandem.text import decoder
from tandem.types import Prompt, Rollout
from tandem.world import World

T = TypeVar("T")
Load = Callable[[Iterable[tuple[str, Tensor]]], None]


@dataclass(frozen=True)
class Sampled:
    """A step's responses, and the number of steps after which the weights were as they sampled."""

    rollouts: list[Rollout]
    version: int

    def tensors(self) -> dict[str, Tensor]:
        """All that the prompts do not tell, to be kept with a checkpoint."""
        return {
            "ids": torch.tensor([token for rollout in self.rollouts for token in rollout.ids]),
            "logprobs": torch.tensor(
                [logprob for rollout in self.rollouts for logprob in rollout.logprobs], dtype=torch.float64
            ),
            "lengths": torch.tensor([len(rollout.ids) for rollout in self.rollouts]),
            "ended": torch.tensor([rollout.ended for rollout in self.rollouts]),
        }


def restored(
    tensors: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    version: int,
    decode: Callable[[Sequence[int], Sequence[int]], str],
) -> Sampled:
    """What `Sampled.tensors` kept, with the prompts that were answered."""
    lengths = tensors["lengths"].tolist()
    ids = [part.tolist() for part in tensors["ids"].split(lengths)]
    logprobs = [part.tolist() for part in tensors["logprobs"].split(lengths)]
    rows = zip(prompts, ids, logprobs, tensors["ended"].tolist(), strict=True)
    return Sampled(
        [Rollout(prompt, tuple(of), tuple(said), decode(prompt.ids, of), ended) for prompt, of, said, ended in rows],
        version,
    )


def batches(prompts: Feed[Prompt], config: PpoConfig, done: int, place: Place) -> Iterator[tuple[list[Prompt], Place]]:
    """The prompts of each step after so many, each repeated for its several responses, and the place after them."""
    for batch, after in prompts.batches(config.rollout.prompts_per_step, done, place):
        yield repeat(batch, config.rollout.responses_per_prompt), after


class InTurn(Generic[T]):
    """Things one after the other, and a look at the one that follows, which is made only for one who looks."""

    def __init__(self, things: Iterator[T]) -> None:
        self._things = things
        self._seen: list[T] = []

    def next(self) -> T:
        return self._seen.pop() if self._seen else next(self._things)

    def following(self) -> T:
        if not self._seen:
            self._seen.append(next(self._things))
        return self._seen[0]


def repeat(prompts: Sequence[Prompt], times: int) -> list[Prompt]:
    """Each prompt several times over, side by side."""
    return [prompt for prompt in prompts for _ in range(times)]


def make_generator(
    policy: CausalPolicy,
    tokenizer: PreTrainedTokenizerBase,
    rollout: SamplingSection,
    random: torch.Generator,
    *,
    load: Load | None = None,
    gather: Gather = "auto",
    together: World | None = None,
) -> TorchGenerator:
    """One that samples from the policy itself; `load` renews its weights where it is a copy of the one that trains.

    `gather` is `rollout.gather`, for processes that share the policy; `together` are the processes that sample.
    """

    def by_layer() -> bool:
        whole = sum(parameter.nbytes for parameter in policy.trunk.model.parameters())
        return gathers_by_layer(gather, whole, free_memory(policy.device))

    return TorchGenerator(
        InStep(policy, by_layer) if policy.trunk.in_parts else policy,
        decoder(tokenizer),
        policy.stop_ids(tokenizer),
        max_new_tokens=rollout.max_new_tokens,
        sequences_per_batch=rollout.sequences_per_batch,
        random=random,
        load=load,
        together=together,
    )


def make_engine(policy: CausalPolicy, config: PpoConfig, context: int) -> VllmEngine:
    """A vLLM engine for the policy; where that is sent as an adapter, its base is in the engine already."""
    settings, trunk = config.rollout.vllm or VllmSection(), policy.trunk
    rank = None
    if policy.adapter is not None and config.adapters is not None and sends_adapter(settings, trunk.device):
        rank = config.adapters.rank
    engine = VllmEngine(
        trunk.model.config,
        trunk.model.dtype,
        trunk.device,
        config.rollout,
        settings,
        context=context,
        rank=rank,
        sleeps=settings.sleep and config.rollout.staleness == 0,
    )
    if engine.takes_adapters:
        engine.load_weights(trunk.merged_weights(None))
    return engine


def sends_adapter(settings: VllmSection, device: torch.device) -> bool:
    """Whether a LoRA adapter is sent as such."""
    return settings.lora == "adapter" or (settings.lora == "auto" and device.type == "cuda")


def send_weights(policy: CausalPolicy, generator: Generator, version: int) -> None:
    """Let the generator sample from the policy as it is now, after `version` steps."""
    if isinstance(generator, VllmGenerator) and generator.takes_adapters:
        assert policy.adapter is not None
        generator.load_adapter(*policy.trunk.adapter_state(policy.adapter), version)
    else:
        generator.load_weights(policy.weights(), version)


@contextmanager
def meanwhile(work: Callable[[], T], give_up: Callable[[], Any]) -> Iterator[Future[T]]:
    """Do the work in a thread beside the block, which asks the future for its result.

    Where the block ends by an error, `give_up` is called, and the thread is waited for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="sampling") as thread:
        future = thread.submit(work)
        try:
            yield future
        except BaseException:
            give_up()
            raise
