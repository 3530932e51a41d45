"""Operators of our own on a CPU: C++ (`kernels.cpp`, `head.cpp`), built by the compiler that torch uses too.

In sampling a few rows meet every matrix, key and value once a token. What there is for it in torch and oneDNN reads
them at a third to a half of the rate at which memory gives them. In training, oneDNN finds a narrow matrix's gradient
at half of the rate of its other products, and logits are written and read three times where once is enough.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import include_paths, library_paths

_FOLDER = Path(__file__).parent
_SOURCES, _HEADERS = (_FOLDER / "kernels.cpp", _FOLDER / "head.cpp"), (_FOLDER / "tiles.h",)
_WIDTHS = (16, 32, 48, 64, 80, 96, 128)
"""Of heads, that the source is compiled for."""
_TYPES = (torch.float32, torch.bfloat16)


def compiler() -> str | None:
    """The C++ compiler's path, if there is one: the one that torch compiles with."""
    return shutil.which(os.environ.get("CXX", "g++"))


_loaded = False


def load_kernels() -> None:
    """Build the operators where this machine has not built them yet (10 s), and make them known to torch.

    Raises RuntimeError where they cannot be built.
    """
    global _loaded
    if _loaded:
        return
    torch.ops.load_library(_built())
    torch.library.register_fake("tandem_cpu::multiply_packed", _shape_of_product)
    torch.library.register_fake("tandem_cpu::attend_one", _shape_of_attention)
    torch.library.register_fake("tandem_cpu::weight_gradients", _shapes_of_gradients)
    _loaded = True


def are_loaded() -> bool:
    """Whether this process has loaded the operators."""
    return _loaded


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`tandem.algo.sample`, without ever writing a probability."""
    tokens, logprobs = torch.ops.tandem_cpu.draw(logits, uniform)
    return tokens, logprobs


def draws(logits: Tensor) -> bool:
    """Whether `draw` knows logits of this type."""
    return logits.dtype in _TYPES


def attends_one(query: Tensor, value: Tensor) -> bool:
    """Whether a single query [B, heads, 1, D] attends by `attend_one` to values [B, key heads, S, D]."""
    width = query.shape[3]
    return _loaded and query.dtype in _TYPES and width in _WIDTHS and value.shape[3] == width


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[B, 1, heads, D]; the mask [1 or B, 1, 1, S] is True where the query reads."""
    found: Tensor = torch.ops.tandem_cpu.attend_one(query, key, value, mask, scaling)
    return found


def multiplies(weight: Tensor) -> bool:
    """Whether there are matrix units for this matrix [outputs, inputs], and it consists of whole tiles of theirs."""
    outputs, inputs = weight.shape
    tiles = outputs % 16 == 0 and (inputs % 32 == 0 or inputs in (8, 16))
    return tiles and weight.dtype == torch.bfloat16 and bool(torch.ops.tandem_cpu.has_matrix_units())


def finds_gradient(upstream: Tensor, rows: Tensor) -> bool:
    """Whether `weight_gradients` multiplies such matrices [N, outputs] and [N, inputs]: tiles of the matrix units."""
    if not (_loaded and upstream.device.type == "cpu" and upstream.dtype == rows.dtype == torch.bfloat16):
        return False
    widths = (upstream.shape[1], rows.shape[1])
    tiles = all(isinstance(width, int) and width % 16 == 0 for width in widths)
    return tiles and bool(torch.ops.tandem_cpu.has_matrix_units())


def weight_gradients(upstream: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """[outputs, inputs] for each upstream gradient [N, outputs] of what matrices made of the same rows [N, inputs]."""
    found: list[Tensor] = torch.ops.tandem_cpu.weight_gradients(upstream, rows)
    return found


def reads_head(head: nn.Module) -> bool:
    """Whether `head_logprobs` multiplies this head [V, H]: a matrix in bfloat16 without a bias, whole tiles of it."""
    weight = head.weight if type(head) is nn.Linear and head.bias is None and "forward" not in vars(head) else None
    if not (_loaded and weight is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16):
        return False
    whole = weight.is_contiguous() and all(size % 32 == 0 for size in weight.shape)
    return whole and bool(torch.ops.tandem_cpu.has_matrix_units())


class HeadLogits(NamedTuple):
    """Of states [N, H] under a head [V, H]: log p[target] and log sum exp(logits), [N] float32 each, and the logits.

    They lie as the units left them, in squares of 32 tokens by 32 rows; none where they were not to be kept.
    """

    logprobs: Tensor
    normalizers: Tensor
    squares: Tensor


def head_logprobs(states: Tensor, weight: Tensor, targets: Tensor, *, keep: bool) -> HeadLogits:
    """Log-probabilities of targets [N] int64, from logits that are read while they are made."""
    return HeadLogits(*torch.ops.tandem_cpu.head_logprobs(states, weight, targets, keep))


def head_states_gradient(found: HeadLogits, weight: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    """[N, H] bfloat16, given the log-probabilities' gradient [N] float32; the logits must have been kept."""
    logprobs, normalizers, squares = found
    gradient: Tensor = torch.ops.tandem_cpu.head_states_gradient(
        squares, weight, targets, logprobs, normalizers, upstream
    )
    return gradient


def head_weight_gradient(
    found: HeadLogits, states: Tensor, targets: Tensor, upstream: Tensor, vocabulary: int
) -> Tensor:
    """[V, H] bfloat16 for a vocabulary of V, as `head_states_gradient`."""
    logprobs, normalizers, squares = found
    gradient: Tensor = torch.ops.tandem_cpu.head_weight_gradient(
        squares, states, targets, logprobs, normalizers, upstream, vocabulary
    )
    return gradient


@torch.no_grad()
def packed_product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's product, from a copy of its weights in the order in which the matrix units read them."""
    weight, bias = layer.weight.detach(), layer.bias
    packed = torch.ops.tandem_cpu.pack(weight)

    def multiplied(rows: Tensor) -> Tensor:
        found: Tensor = torch.ops.tandem_cpu.multiply_packed(rows, packed, weight, bias)
        return found

    return multiplied


def _shape_of_product(rows: Tensor, _: Tensor, weight: Tensor, __: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


def _shapes_of_gradients(upstream: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [rows.new_empty(gradient.shape[1], rows.shape[1]) for gradient in upstream]


def _shape_of_attention(query: Tensor, _: Tensor, value: Tensor, *__: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])


def _built() -> Path:
    """The library for these sources, torch and processor, from the cache or built into it."""
    capability = torch.backends.cpu.get_cpu_capability()
    options = ["-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC"]
    options += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    told_by = (
        [path.read_bytes() for path in (*_SOURCES, *_HEADERS)],
        torch.__version__,
        options,
        sorted(torch.cpu.get_capabilities().items()),
    )
    name = f"{hashlib.sha256(repr(told_by).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "kernels"
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            # One process builds, and the others wait for it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _build(options, library)
    return library


def _build(options: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as beside:
        _compile(options, Path(beside) / library.name)
        (Path(beside) / library.name).replace(library)


def _compile(options: Sequence[str], library: Path) -> None:
    program = compiler()
    if program is None:
        raise RuntimeError("there is no C++ compiler")
    found = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    # All in one, since most of the time goes into torch's headers.
    together = "".join(f'#include "{path}"\n' for path in _SOURCES)
    words = [program, *options, *found, "-x", "c++", "-", "-o", str(library), "-lc10", "-ltorch_cpu", "-ltorch"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, input=together)
    if done.returncode:
        raise RuntimeError(f"{program} cannot compile the operators: {_first_error(done.stderr)}")


def _first_error(said: str) -> str:
    lines = said.strip().splitlines() or ["it says nothing"]
    return next((line for line in lines if "error" in line), lines[0])
