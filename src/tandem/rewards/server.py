"""A server that is asked over HTTP: several requests at once, each again where it was busy, broken or out of reach."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx2

from tandem.errors import InputError
from tandem.rewards.faults import shown

Answer = TypeVar("Answer")

SHOWN_OF_BODY = 200
COME_AGAIN = frozenset({408, 425, 429})
LONGEST_WAIT_SECONDS = 30.0


class NoAnswerError(Exception):
    """A response that does not answer what was asked; `again` is whether another try may be answered, and after how
    many seconds the server asked for it, where it did."""

    def __init__(self, found: str, again: bool, wait_seconds: float = 0.0) -> None:
        super().__init__(found)
        self.again = again
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """A request. `read` makes its answer of status, headers and body, or raises NoAnswerError; `given_up` makes one of
    the last such error and the number of tries, or raises what ends the asking."""

    body: bytes
    read: Callable[[int, Mapping[str, str], bytes], Answer]
    given_up: Callable[[NoAnswerError, int], Answer]


@dataclass(frozen=True)
class Patience:
    """How long one request may take, how often it is tried again, and how many are on their way together."""

    timeout_seconds: float
    retries: int
    requests_at_once: int
    first_wait_seconds: float = 0.5


@dataclass(frozen=True)
class Server:
    """A server at an address. The wait before another try doubles from try to try."""

    url: str
    patience: Patience
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    tls: ssl.SSLContext = field(default_factory=httpx2.create_ssl_context)

    def check(self, key: str) -> None:
        """Raises InputError where the address, which a recipe calls `key`, cannot be asked."""
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise InputError(f"{key} = {self.url!r} is no address of a server: {error}.") from None

    def ask(self, questions: Sequence[Question[Answer]]) -> list[Answer]:
        """An answer to each question, in their order. The first error that `given_up` raises stops all requests."""
        return asyncio.run(self._ask(questions))

    async def _ask(self, questions: Sequence[Question[Answer]]) -> list[Answer]:
        gate = asyncio.Semaphore(self.patience.requests_at_once)
        unlimited = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=None, limits=unlimited, verify=self.tls) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._in_turn(client, gate, question)) for question in questions]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from errors.exceptions[0].__cause__
        return [task.result() for task in tasks]

    async def _in_turn(self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, question: Question[Answer]) -> Answer:
        async with gate:
            return await self._tried(client, question)

    async def _tried(self, client: httpx2.AsyncClient, question: Question[Answer]) -> Answer:
        """Ask until there is an answer, tries are used up, or the server says what another try cannot change."""
        wait = self.patience.first_wait_seconds
        for tries in itertools.count(1):
            try:
                return await self._post(client, question)
            except NoAnswerError as bad:
                if not bad.again or tries > self.patience.retries:
                    return question.given_up(bad, tries)
                own = wait * _RANDOM.uniform(0.5, 1.0)
                await asyncio.sleep(min(max(own, bad.wait_seconds), LONGEST_WAIT_SECONDS))
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise AssertionError("there is no last try")

    async def _post(self, client: httpx2.AsyncClient, question: Question[Answer]) -> Answer:
        """One try. The limit holds for the whole of it: a server that trickles its answer is slow too."""
        seconds, headers = self.patience.timeout_seconds, {"content-type": "application/json", **self.headers}
        try:
            async with asyncio.timeout(seconds):
                response = await client.post(self.url, content=question.body, headers=headers)
        except TimeoutError:
            raise NoAnswerError(f"did not answer within {seconds:g} s", again=True) from None
        except httpx2.HTTPError as error:
            raise NoAnswerError(f"did not answer ({type(error).__name__}: {error})", again=True) from error
        return question.read(response.status_code, response.headers, response.content)


# Its own, so that waiting leaves the random state of the run as it is.
_RANDOM = random.Random()


def json_of(status: int, headers: Mapping[str, str], body: bytes) -> Any:
    """The content of a response that went well.

    Raises NoAnswerError where it did not: to be asked again where the server was busy or broken or did not finish its
    answer, never where it says that the request is wrong.
    """
    text = shown_body(body)
    if status in COME_AGAIN or status >= 500:
        raise NoAnswerError(f"answered {status} with {text}", True, _wait_asked_for(headers.get("retry-after", "")))
    if 300 <= status < 400:
        raise NoAnswerError(
            f"answered {status}, a redirect to {headers.get('location')!r}, which is not followed", False
        )
    if not 200 <= status < 300:
        raise NoAnswerError(f"answered {status} with {text}", False)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise NoAnswerError(f"answered {status} with what is not JSON, {text}", True) from None


def shown_body(body: bytes) -> str:
    """The beginning of a response's body, for messages."""
    return shown(body.decode(errors="replace"), SHOWN_OF_BODY)


def _wait_asked_for(retry_after: str) -> float:
    """Seconds of a Retry-After header, which holds those or a date; 0 where it holds neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
