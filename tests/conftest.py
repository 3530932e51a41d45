"""Models that tests share, made on the spot."""

from __future__ import annotations

import os

# One thread a worker: the tests run side by side, and so do the commands that they start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tiny import save_tiny

torch.set_num_threads(1)
# Models are saved by tests that then read what a command says.
transformers.logging.disable_progress_bar()

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2", "gemma3")
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny causal language model of an architecture, with a tokenizer that can chat."""
    made: dict[str, Path] = {}

    def folder(architecture: str = "llama") -> Path:
        if architecture not in made:
            path = tmp_path_factory.mktemp(architecture)
            save_tiny(architecture, path)
            made[architecture] = path
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def tiny_reward(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a one-label classifier with the tokenizer of the tiny llama; its head answers at random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny_reward")
    config = AutoConfig.from_pretrained(tiny("llama"), num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real, tiny language model, where it is at hand."""
    path = SHARED / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip("the stories260K model is not at hand")
    return path
