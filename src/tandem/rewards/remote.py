"""A reward from a server: samples go out as JSON over HTTP and scores come back (docs/remote-rewards.md)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import httpx2

from tandem.config import RewardSource
from tandem.errors import InputError
from tandem.rewards.answers import AnswerReader, Decode
from tandem.rewards.composition import Earned
from tandem.rewards.faults import Fault, failure
from tandem.rewards.protocol import NoScoresError, request_body, scores_of
from tandem.types import Rollout

LONGEST_WAIT_SECONDS = 30.0


class RemoteReward:
    """Asks a server for scores, several requests at once, and asks again where it was busy, broken or out of reach."""

    def __init__(self, source: RewardSource, decode: Decode, first_wait_seconds: float = 0.5) -> None:
        """Raises InputError where the url of the source cannot be asked. The wait before another try begins with
        `first_wait_seconds` and doubles from try to try."""
        assert source.url is not None
        try:
            self._url = httpx2.URL(source.url)
        except httpx2.InvalidURL as error:
            raise InputError(f"the rewards' url = {source.url!r} is no address of a server: {error}.") from None
        self._source = source
        self._first_wait = first_wait_seconds
        self._reader = AnswerReader(f"reward server {source.url!r}", decode, source.on_error)
        self._tls = httpx2.create_ssl_context()
        # Its own, so that waiting leaves the random state of the run as it is.
        self._random = random.Random()

    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        """Raises RewardError where samples get no score after all tries, unless such samples are to be skipped."""
        return self._reader.earned(asyncio.run(self._ask(rollouts)), rollouts)

    async def _ask(self, rollouts: Sequence[Rollout]) -> list[Any]:
        """The answer to each sample, or its fault; where that ends the run, the first error stops all requests."""
        size = self._source.samples_per_request
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        gate = asyncio.Semaphore(self._source.requests_at_once)
        unlimited = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=None, limits=unlimited, verify=self._tls) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._answers(client, gate, part)) for part in parts]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from errors.exceptions[0].__cause__
        return [answer for task in tasks for answer in task.result()]

    async def _answers(
        self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, part: Sequence[Rollout]
    ) -> Sequence[Any]:
        async with gate:
            answers = await self._scores(client, part)
        if not isinstance(answers, Fault):
            return answers
        if not self._reader.skips:
            raise failure(answers, self._reader.name, part[0])
        return [answers] * len(part)

    async def _scores(self, client: httpx2.AsyncClient, part: Sequence[Rollout]) -> list[Any] | Fault:
        """Ask until there is an answer, tries are used up, or the server says what another try cannot change."""
        body, wait = request_body(part), self._first_wait
        for tries in itertools.count(1):
            try:
                return await self._post(client, body, len(part))
            except NoScoresError as bad:
                if not bad.again or tries > self._source.retries:
                    remedy = "see that it runs and is fast enough, or raise retries or timeout_seconds"
                    wanted = remedy if bad.again else "docs/remote-rewards.md says what it should answer"
                    return Fault(f"{bad} (tries: {tries})", wanted, len(part), bad)
                own = wait * self._random.uniform(0.5, 1.0)
                await asyncio.sleep(min(max(own, bad.wait_seconds), LONGEST_WAIT_SECONDS))
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise AssertionError("there is no last try")

    async def _post(self, client: httpx2.AsyncClient, body: bytes, count: int) -> list[Any]:
        """One try. The limit holds for the whole of it: a server that trickles its answer is slow too."""
        seconds = self._source.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                response = await client.post(self._url, content=body, headers={"content-type": "application/json"})
        except TimeoutError:
            raise NoScoresError(f"did not answer within {seconds:g} s", again=True) from None
        except httpx2.HTTPError as error:
            raise NoScoresError(f"did not answer ({type(error).__name__}: {error})", again=True) from error
        return scores_of(response.status_code, response.headers, response.content, count)
