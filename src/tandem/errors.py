"""The ways in which a command ends badly, each with one message for a person."""


class InputError(Exception):
    """What the person gave cannot be used: exit status 2.

    The message names the file, row or key, what was found, what is allowed and what to do.
    """


class BadRowError(InputError):
    """A row of data cannot be used; the message says where it stands."""


class RunError(Exception):
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
