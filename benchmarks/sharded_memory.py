"""How much main memory each of several processes needs at most, beyond what it had, for what it does with a model.

    .venv/bin/python benchmarks/sharded_memory.py [PROCESSES]

Linux only. A Llama of some 400 MB with random weights is made in a temporary folder, and each line of the table is
measured in processes of its own, on the CPU, in float32. What a process kept in the end is counted with the rest.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
SMALL, LARGE = (64, 1), (512, 32)


def peak_growth(work: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that this process had in memory at once while it worked, less those before, and what it made."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    made = work()
    return _memory("VmHWM") - before, made


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def save_llama(folder: Path, width: int, layers: int) -> int:
    """A causal language model with random weights, and its tokenizer; returns the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def _measures(source: Path, folder: Path) -> dict[str, Callable[[], int]]:
    """What is measured in each process, by the line of the table that it makes."""
    import torch

    from tandem.config import AdapterSection, OptimizerSection, SamplingSection
    from tandem.engine.local import LocalEngine, ParameterGroup
    from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
    from tandem.models.loading import load_causal, load_tokenizer
    from tandem.models.saving import save_policy
    from tandem.models.trunk import Trunk
    from tandem.models.unread import load_trunk
    from tandem.run.checkpoints import Snapshot, read_checkpoint, write_checkpoint
    from tandem.stages.sampling import make_generator
    from tandem.types import Prompt, whole_texts

    cpu = torch.device("cpu")

    def trunk(path: Path = source) -> Trunk:
        return load_trunk(str(path), "model", torch.float32, cpu, False, print)

    def read_whole(path: Path = source) -> Trunk:
        return Trunk(load_causal(str(path), "model", torch.float32, cpu))

    def policy() -> CausalPolicy:
        return CausalPolicy(trunk(), FULL_DISTRIBUTION)

    def sampled(model: CausalPolicy, gather: str) -> Any:
        tokenizer, settings = load_tokenizer(str(source), "model"), SamplingSection(max_new_tokens=4)
        random = torch.Generator().manual_seed(0)
        generator = make_generator(model, tokenizer, settings, random, gather=gather)
        return generator.generate([Prompt((5, 6, 7), "", None, {})] * 4)

    def engine(model: CausalPolicy) -> LocalEngine:
        parameters = list(model.trunk.model.requires_grad_(True).parameters())
        return LocalEngine([ParameterGroup(parameters, 1e-4)], OptimizerSection())

    def one_step(model: CausalPolicy) -> LocalEngine:
        trained = engine(model)
        trained.backward(-model.logprobs(whole_texts([[5, 6, 7, 8]])).sum())
        trained.step()
        return trained

    def checkpoint() -> int:
        state = one_step(policy()).state()
        return peak_growth(lambda: write_checkpoint(folder.parent / "checkpoints", Snapshot(1, state, {})))[0]

    def resume() -> int:
        fresh = engine(policy())
        saved = read_checkpoint(folder.parent / "checkpoints" / "step_000001").tensors
        return peak_growth(lambda: fresh.load_state(saved))[0]

    def warm(load: Callable[[Path], Trunk]) -> Callable[[], int]:
        load(folder / "small")
        return lambda: peak_growth(load)[0]

    def of(work: Callable[[CausalPolicy], Any]) -> Callable[[], int]:
        def measured() -> int:
            model = policy()
            return peak_growth(lambda: work(model))[0]

        return measured

    return {
        "loading, read whole and then cut": lambda: warm(read_whole)(),
        "loading, each process its part": lambda: warm(trunk)(),
        "adding LoRA adapters": of(lambda model: model.trunk.add_adapter("policy", AdapterSection(rank=4))),
        "sampling, the model gathered": of(lambda model: sampled(model, "model")),
        "sampling, a layer at a time": of(lambda model: sampled(model, "layer")),
        "saving the model": of(
            lambda model: save_policy(model.trunk, None, load_tokenizer(str(source), "model"), folder / "saved")
        ),
        "writing a checkpoint": checkpoint,
        "going on from it, AdamW's state included": resume,
    }


def _work(name: str, source: Path, folder: Path) -> None:
    """One of the processes: measures, and writes down what it found."""
    import transformers

    from tandem.world import join, leave, world

    transformers.logging.disable_progress_bar()
    join("cpu", replicate=1, checkpointing=False)
    found = world().gather(_measures(source, folder)[name]())
    if world().first:
        (folder / "found.json").write_text(json.dumps(found))
    leave()


def _measure(name: str, source: Path, folder: Path, processes: int) -> list[int]:
    folder.mkdir()
    save_llama(folder / "small", *SMALL)
    shared = {"WORLD_SIZE": str(processes), "TANDEM_RENDEZVOUS": str(folder / "rendezvous"), "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, __file__, "--measure", name, str(source), str(folder)]
    workers = [
        subprocess.Popen(words, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    statuses = [worker.wait() for worker in workers]
    if any(statuses):
        raise SystemExit(f"{name}: a process failed")
    return json.loads((folder / "found.json").read_text())


def main(processes: int) -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-memory-") as place:
        source = Path(place) / "model"
        size = save_llama(source, *LARGE)
        print(f"{size / MIB:.0f} MiB of weights, {processes} processes; most memory of a process beyond what it had:")
        for number, name in enumerate(_measures(source, source)):
            found = _measure(name, source, Path(place) / str(number), processes)
            print(f"{name:42} {max(found) / MIB:6.0f} MiB  {max(found) / size:5.2f} of the weights", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        _work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 2)
