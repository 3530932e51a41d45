"""The ways in which a command ends badly, each with one message for a person."""

import re

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses of a command."""

_LONGEST = 1200
_LEFT_OUT = " ... "
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad alloc",
    "bad_alloc",
)


class _ToldError(Exception):
    """Its message is one line that a terminal can show, however the text came that it quotes."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class InputError(_ToldError):
    """What the person gave cannot be used: exit status 2.

    The message names the file, row or key, what was found, what is allowed and what to do.
    """


class BadRowError(InputError):
    """A row of data cannot be used; the message says where it stands."""


class ConversationError(InputError):
    """The chat template refuses one conversation; others may be as it wants them."""


class RunError(_ToldError):
    """A run that began well could not go on: exit status 1."""


class RewardError(RunError):
    """A reward did not answer as it should; the message names the reward and the sample.

    Where a reward is tried before training, it is the person's input that is refused.
    """


class NotFinite(Exception):
    """A number that is not finite, met before it could reach a weight: the step is skipped for it."""

    def __init__(self, where: str, remedy: str) -> None:
        super().__init__(f"{where} is not finite")
        self.where = where
        self.remedy = remedy


class Interrupted(Exception):
    """A run was ended from outside before it was done: exit status 130. The message says how to go on."""


def one_line(text: str) -> str:
    """Line breaks become spaces, what cannot be shown is escaped, and of a very long text the middle is left out."""
    flat = _LINE_BREAKS.sub(" ", text.strip())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in flat)
    if len(shown) <= _LONGEST:
        return shown
    kept = (_LONGEST - len(_LEFT_OUT)) // 2
    return f"{shown[:kept]}{_LEFT_OUT}{shown[-kept:]}"


def reason_of(error: BaseException) -> str:
    """Of what a library says, often at length, the line that a person can act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, LookupError | TypeError | AttributeError):
        said = f"{type(error).__name__}: {said}"
    return (said if len(said) <= 300 else f"{said[:297]}...").rstrip(" .:")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, or where the CPU's allocator was refused."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(sign in said for sign in _NO_MEMORY)
