"""Sampling by vLLM: an engine in this process, beside the trainer, with weights of its own that are renewed in place.

Of several processes that train together each has an engine, or several have one, each with a part of its weights. Then
vLLM's own processes are these, in groups of its own among them.

vLLM is imported once an engine is made, so that everything else works where it is not installed.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

from tandem.config import SamplingSection, VllmSection
from tandem.errors import InputError, reason_of
from tandem.rollout.stopping import Stopping
from tandem.types import Prompt, Rollout
from tandem.world import World, dealt_in_order, world

# In process; nothing is reported home or listened for elsewhere; the trainer's threads stay where they are. Python's
# tracker clears away what processes shared when they end, and need not tell of it.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "PYTHONWARNINGS": "ignore:::multiprocessing.resource_tracker",
}
# What an engine takes is said in bytes. vLLM also wants a share of a GPU to be free before it starts: by default most,
# and the models that train are there already.
_SHARE_FREE_AT_START = 0.01
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ADAPTER = "policy"
_KEPT: list[Any] = []
"""Engines of processes that train together. One that is collected ends the group that all of them talk in."""


def check_installed() -> None:
    """Raises InputError where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            'rollout.generator = "vllm" needs vLLM, which is not installed here; run `make .venv-vllm/ready`, which '
            'makes an environment with it, and train with .venv-vllm/bin/tandem, or set rollout.generator = "torch".'
        )


class VllmEngine:
    """A vLLM engine that answers for one model under one sampling rule.

    `config` is the model's configuration, a transformers PreTrainedConfig: the weights come by `load_weights`, before
    the first response. `context` is the longest prompt and response together. `rank` is that of the LoRA adapter that
    `load_adapter` will bring, where the policy is sent as one. With `sleeps`, a GPU's memory is given back after every
    `generate`, until the next weights come. Of `settings.tensor_parallel` processes that train together each has a part
    of the weights: they are asked for the same at the same time, and all of them hear the answers.

    Raises InputError where vLLM is not installed, or cannot serve this model on this device.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        sampling: SamplingSection,
        settings: VllmSection,
        *,
        context: int,
        rank: int | None = None,
        sleeps: bool = False,
    ) -> None:
        check_installed()
        self.sampling = sampling
        self.tensor_parallel = settings.tensor_parallel
        on_gpu = device.type == "cuda"
        self._sleeps = sleeps and on_gpu
        self._asleep = False
        self._takes_adapters = rank is not None
        self._adapter: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-vllm-")
        config.save_pretrained(self._folder.name)
        lora = {} if rank is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank_for(rank)}
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # An engine takes its process groups along where it is collected, and a later engine's with them.
        gc.collect()
        with (
            process_untouched(),
            _refused(),
            warnings.catch_warnings(),
            _shared(self.tensor_parallel, on_gpu) as shared,
        ):
            warnings.simplefilter("ignore", FutureWarning)
            import vllm

            self._vllm: Any = vllm
            self._llm: Any = vllm.LLM(
                model=self._folder.name,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=context,
                max_num_seqs=sampling.sequences_per_batch,
                kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
                gpu_memory_utilization=_SHARE_FREE_AT_START,
                logprobs_mode="processed_logprobs",
                enforce_eager=not (on_gpu if settings.compiled is None else settings.compiled),
                enable_sleep_mode=self._sleeps,
                disable_log_stats=True,
                **lora,
                **shared,
            )
            if not world().alone:
                _KEPT.append(self._llm)
            self._answers([(0,)], [0], stop_ids=[], limit=1, stopping=Stopping())
        self._rest()

    @property
    def takes_adapters(self) -> bool:
        """Whether `load_adapter` renews the policy, over a base that `load_weights` brought."""
        return self._takes_adapters

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Renew all weights in place, from those of a saved model one by one, and forget what older ones computed."""
        with process_untouched():
            self._wake("weights")
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            self._wake("kv_cache")
            self._llm.reset_prefix_cache()
        self._asleep = False

    def load_adapter(self, config: Any, weights: Mapping[str, Tensor]) -> None:
        """Renew the adapter, given as peft keeps it: its configuration and its weights under peft's names.

        Raises InputError where vLLM cannot carry such an adapter on this model.
        """
        from vllm.lora.request import LoRARequest

        with process_untouched(), tempfile.TemporaryDirectory(prefix="tandem-adapter-") as folder:
            self._wake("weights")
            config.save_pretrained(folder)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(tensors, Path(folder) / "adapter_model.safetensors")
            with _refused('the policy\'s adapter; set rollout.vllm.lora = "merge"'):
                self._llm.llm_engine.add_lora(LoRARequest(_ADAPTER, 1, folder, load_inplace=True))
            self._adapter = LoRARequest(_ADAPTER, 1, folder)
            self._wake("kv_cache")
            self._llm.reset_prefix_cache()
        self._asleep = False

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], stop_ids: Sequence[int], stopping: Stopping
    ) -> list[Any]:
        """What vLLM says to each prompt, in their order; equal seeds say the same. Raises GivenUp once asked to."""
        if self._asleep:
            raise RuntimeError("the engine sleeps, and its weights are gone: load_weights comes before generate")
        with process_untouched():
            answers = self._answers(prompts, seeds, stop_ids, self.sampling.max_new_tokens, stopping)
        self._rest()
        return answers

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        stop_ids: Sequence[int],
        limit: int,
        stopping: Stopping,
    ) -> list[Any]:
        engine, rule = self._llm.llm_engine, self.sampling
        for number, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            parameters = self._vllm.SamplingParams(
                temperature=rule.temperature,
                top_k=rule.top_k or 0,
                top_p=rule.top_p,
                seed=seed,
                max_tokens=limit,
                stop_token_ids=list(stop_ids),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            engine.add_request(str(number), {"prompt_token_ids": list(ids)}, parameters, lora_request=self._adapter)
        answers: dict[int, Any] = {}
        while engine.has_unfinished_requests():
            stopping.check()
            answers |= {int(found.request_id): found.outputs[0] for found in engine.step() if found.finished}
        return [answers[number] for number in range(len(prompts))]

    def _rest(self) -> None:
        """Give a GPU's memory back. A base under an adapter is kept in main memory; whole weights will come anew."""
        if self._sleeps:
            self._llm.sleep(level=1 if self.takes_adapters else 2)
            self._asleep = True

    def _wake(self, part: str) -> None:
        if self._asleep:
            self._llm.wake_up(tags=[part])


def draw_seeds(count: int, random: torch.Generator) -> Tensor:
    """The chance in so many responses: a seed [count] int64 for each."""
    return torch.randint(2**63 - 1, (count,), generator=random, device=random.device)


class VllmGenerator:
    """Samples from the weights that were last sent to an engine, which generators with other random states can share.

    `decode` turns a prompt's and a response's ids into the response's text; `stop_ids` end a response. Each response
    has a seed of its own, drawn from `random`. Of `together`, the processes that train together unless others are
    given, each engine answers its share of the prompts.
    """

    def __init__(
        self,
        engine: VllmEngine,
        decode: Callable[[Sequence[int], Sequence[int]], str],
        stop_ids: Iterable[int],
        random: torch.Generator,
        together: World | None = None,
    ) -> None:
        self._engine = engine
        self._decode = decode
        self._stop_ids = sorted(stop_ids)
        self._random = random
        self._together = together or world()
        self._stopping = Stopping()
        self.version = 0

    @property
    def takes_adapters(self) -> bool:
        """Whether the policy is sent by `load_adapter`."""
        return self._engine.takes_adapters

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from these weights, under the names of a saved model, from now on."""
        self._engine.load_weights(weights)
        self.version = version

    def load_adapter(self, config: Any, weights: Mapping[str, Tensor], version: int) -> None:
        """Sample from the engine's base with this adapter, as peft keeps it, from now on."""
        self._engine.load_adapter(config, weights)
        self.version = version

    def stop(self) -> None:
        """Let a `generate` in another thread end before its next token, by raising GivenUp."""
        self._stopping.ask()

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response for each prompt, in their order."""
        return self.answer(prompts, draw_seeds(len(prompts), self._random))

    def answer(self, prompts: Sequence[Prompt], seeds: Tensor) -> list[Rollout]:
        """One response for each prompt, in their order, from their seeds as `draw_seeds` makes them."""
        parts = self._engine.tensor_parallel
        engine, engines = self._together.rank // parts, self._together.size // parts
        # Prompts that are asked several times lie together, and go to one engine.
        own = dealt_in_order(prompts, engines)[engine]
        own_seeds = dealt_in_order(seeds.tolist(), engines)[engine]
        answers = self._engine.generate([prompt.ids for prompt in own], own_seeds, self._stop_ids, self._stopping)
        rollouts = [self._rollout(prompt, answer) for prompt, answer in zip(own, answers, strict=True)]
        return [rollout for share in self._together.gather(rollouts)[::parts] for rollout in share]

    def _rollout(self, prompt: Prompt, answer: Any) -> Rollout:
        ids = tuple(answer.token_ids)
        logprobs = tuple(at[token].logprob for at, token in zip(answer.logprobs, ids, strict=True))
        return Rollout(prompt, ids, logprobs, self._decode(prompt.ids, ids), answer.finish_reason == "stop")


@contextmanager
def _shared(tensor_parallel: int, on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Within it an engine is made: what it is told of the processes that train together.

    On a CPU those that share one meet in files of shared memory, under a name that vLLM gives to every such engine of a
    machine and that outlives a process that is killed. Here it is this run's own, and gone once all have opened them.
    """
    if world().alone:
        yield {}
        return
    if on_gpu:
        yield {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": tensor_parallel}
        return
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    name = world().from_first(lambda: f"tandem-{uuid.uuid4().hex}")

    class Executor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            _, rank, local_rank = super()._distributed_args()
            return f"file://{name}", rank, local_rank

    try:
        yield {"distributed_executor_backend": Executor, "tensor_parallel_size": tensor_parallel}
        world().wait_for_all()
    finally:
        for path in Path("/dev/shm").glob(f"{name}*"):
            path.unlink(missing_ok=True)


@contextmanager
def process_untouched() -> Iterator[None]:
    """vLLM seeds and draws from the process's random states and takes torch.set_num_threads away; here nobody sees it.

    Beside a thread that draws from them too, what that one draws within the block is drawn again after it.
    """
    python, arrays, threads = random.getstate(), numpy.random.get_state(), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
            torch.set_num_threads = threads


@contextmanager
def _refused(what: str = 'policy.model; set rollout.generator = "torch"') -> Iterator[None]:
    """Within it, whatever vLLM cannot do is told in one message."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"vLLM cannot serve {what}. It says: {reason_of(error)}") from error


def _rank_for(rank: int) -> int:
    """The smallest rank that vLLM provides for which holds this one."""
    fitting = [known for known in _RANKS if known >= rank]
    if not fitting:
        raise InputError(
            f"adapters.rank = {rank}, and vLLM carries at most {_RANKS[-1]}; lower it, or set "
            'rollout.vllm.lora = "merge".'
        )
    return fitting[0]
