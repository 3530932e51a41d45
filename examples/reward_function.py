"""A reward is any function from prompts, responses and the prompts' rows to one number a response.

In a recipe:

    [[rewards]]
    function = "examples/reward_function.py:short_and_polite"
"""

from collections.abc import Mapping, Sequence
from typing import Any


def short_and_polite(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[float]:
    """1 for a response that says please or thank, less a little for every word."""
    return [
        float(any(word in response.lower() for word in ("please", "thank"))) - 0.01 * len(response.split())
        for response in responses
    ]


if __name__ == "__main__":
    print(short_and_polite(["Hello."] * 2, ["Thank you, and please come in.", "No."], [{}, {}]))
