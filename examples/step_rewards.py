"""Process rewards at their own tokens: every sum that a response works out is paid where it ends, if it is right.

[[rewards]]
function = "examples/step_rewards.py:worked_sums"
"""

import re

SUM = re.compile(r"(\d+)\s*([+*-])\s*(\d+)\s*=\s*(\d+)")
WORK = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def worked_sums(prompts, responses, rows):
    """Pairs (end, reward) for each response: +0.1 at the end of a right sum, -0.1 at that of a wrong one."""
    return [list(paid(response)) for response in responses]


def paid(response):
    for found in SUM.finditer(response):
        left, sign, right, said = found.groups()
        right_sum = WORK[sign](int(left), int(right)) == int(said)
        yield found.end(), 0.1 if right_sum else -0.1


if __name__ == "__main__":
    text = "48 + 24 = 72, and 72 - 2 = 71."
    for end, reward in paid(text):
        print(f"{reward:+.1f} for {text[:end]!r}")
