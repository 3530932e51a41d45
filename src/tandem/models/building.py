"""Builds the operators that are written in C++, by the compiler that torch uses too, once for a machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("kernels.cpp", "attention.cpp", "head.cpp"))
_HEADERS = tuple(_FOLDER / name for name in ("vectors.h", "tiles.h"))


def compiler() -> str | None:
    """The C++ compiler's path, if there is one: the one that torch compiles with."""
    return shutil.which(os.environ.get("CXX", "g++"))


def built_library() -> Path:
    """The library for these sources, torch and processor, from the cache or built into it (20 s).

    Raises RuntimeError where it cannot be built.
    """
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
