"""Bars and advice of the libraries below are not for the person who runs a command."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Switch them off, in this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
