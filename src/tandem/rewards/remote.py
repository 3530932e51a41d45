"""A reward from a server: samples go out as JSON over HTTP and scores come back (docs/remote-rewards.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tandem.config import RewardSource
from tandem.rewards.answers import AnswerReader, Decode
from tandem.rewards.composition import Earned
from tandem.rewards.faults import Fault, failure
from tandem.rewards.protocol import request_body, scores_of
from tandem.rewards.server import NoAnswerError, Patience, Question, Server
from tandem.types import Rollout


class RemoteReward:
    """Asks a server for scores, a few samples in each request."""

    def __init__(self, source: RewardSource, decode: Decode, first_wait_seconds: float = 0.5) -> None:
        """Raises InputError where the url of the source cannot be asked. The wait before another try begins with
        `first_wait_seconds`."""
        assert source.url is not None
        self._source = source
        patience = Patience(source.timeout_seconds, source.retries, source.requests_at_once, first_wait_seconds)
        self._server = Server(source.url, patience)
        self._server.check("the rewards' url")
        self._reader = AnswerReader(f"reward server {source.url!r}", decode, source.on_error)

    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        """Raises RewardError where samples get no score after all tries, unless such samples are to be skipped."""
        size = self._source.samples_per_request
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        answers = self._server.ask([self._question(part) for part in parts])
        return self._reader.earned([answer for part in answers for answer in part], rollouts)

    def _question(self, part: Sequence[Rollout]) -> Question[list[Any]]:
        return Question(request_body(part), partial(scores_of, count=len(part)), partial(self._no_scores, part))

    def _no_scores(self, part: Sequence[Rollout], bad: NoAnswerError, tries: int) -> list[Any]:
        """The fault of each sample of a request; where that ends the run, an error."""
        remedy = "see that it runs and is fast enough, or raise retries or timeout_seconds"
        wanted = remedy if bad.again else "docs/remote-rewards.md says what it should answer"
        fault = Fault(f"{bad} (tries: {tries})", wanted, len(part), bad)
        if not self._reader.skips:
            raise failure(fault, self._reader.name, part[0])
        return [fault] * len(part)
