"""A timed process: `python -m tandem.bench.timed MODULE WORDS` runs a module in memory that is kept from the start on.

As the command line does; here before the module's imports, some of which make tensors.
"""

from __future__ import annotations

import runpy
import sys

from tandem.allocator import keep_memory


def command(module: str, *words: str) -> list[str]:
    """The command line of such a process."""
    return [sys.executable, "-m", __name__, module, *words]


if __name__ == "__main__":
    keep_memory()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
