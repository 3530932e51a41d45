"""A judge of pairs behind an OpenAI-compatible chat endpoint, shown every pair in both positions."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from tandem.config import JUDGE_PLACES, JudgeSection
from tandem.errors import InputError, RewardError
from tandem.rewards.faults import sample, shown
from tandem.rewards.server import NoAnswerError, Patience, Question, Server, json_of, shown_body
from tandem.types import Prompt, Rollout

PROMPT = """Two assistants were given the same prompt. Decide whose response is the better one: more helpful, \
accurate, relevant and well written. Length as such is no merit, and neither is coming first.

<prompt>
{prompt}
</prompt>

<response A>
{first}
</response A>

<response B>
{second}
</response B>

End with your verdict alone on the last line: [[A]] if response A is better, [[B]] if response B is better, [[C]] if \
neither is."""

Verdict = Literal["A", "B", "C"]

_MARKED = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_ALONE = re.compile(r"\A\W*([ABC])\W*\Z")
_PLACES = re.compile("|".join(map(re.escape, JUDGE_PLACES)))
_PROBE = Prompt((0,), "What do bees make?", None, {})


@dataclass(frozen=True)
class Judgement:
    """What the judge said of a pair: with our response shown first, and with it shown second."""

    shown_first: Verdict
    shown_second: Verdict

    @property
    def consistent(self) -> bool:
        """Whether both positions gave the same winner, or both none."""
        return _OUTCOME[self.shown_first] == 1 - _OUTCOME[self.shown_second]

    @property
    def outcome(self) -> float:
        """1 where our response won in both positions, 0 where it lost in both, else a tie: 1/2."""
        return _OUTCOME[self.shown_first] if self.consistent else 0.5

    @property
    def preference_for_first(self) -> float:
        """How much of the two verdicts went to the response shown first: 1/2 without a bias of position."""
        return (_OUTCOME[self.shown_first] + _OUTCOME[self.shown_second]) / 2


_OUTCOME: Mapping[Verdict, float] = {"A": 1.0, "C": 0.5, "B": 0.0}


class Judge:
    """Asks a chat endpoint which of two responses is better."""

    def __init__(self, settings: JudgeSection, first_wait_seconds: float = 0.5) -> None:
        """Raises InputError where the endpoint cannot be asked, or the variable of its key holds none."""
        self._settings = settings
        self._key = _key_from(settings.api_key_env)
        self.model = settings.model
        self.name = f"judge {settings.model!r} at {settings.url!r}"
        self._server = Server(
            f"{settings.url.rstrip('/')}/chat/completions",
            Patience(settings.timeout_seconds, settings.retries, settings.requests_at_once, first_wait_seconds),
            {} if self._key is None else {"authorization": f"Bearer {self._key}"},
        )
        self._server.check("judge.url")

    def compare(self, ours: Sequence[Rollout], theirs: Sequence[Rollout]) -> list[Judgement | None]:
        """The judgement of each pair, in their order; None where there is none and such pairs are skipped.

        Raises RewardError where a pair gets no verdict after all tries, unless such pairs are to be skipped, and where
        none of them does.
        """
        pairs = list(zip(ours, theirs, strict=True))
        skips = self._settings.on_error == "skip"
        asked = [self._question(first, second, skips) for a, b in pairs for first, second in ((a, b), (b, a))]
        verdicts = self._server.ask(asked)
        found: list[Judgement | None] = []
        for first, second in zip(verdicts[::2], verdicts[1::2], strict=True):
            unjudged = isinstance(first, _Unjudged) or isinstance(second, _Unjudged)
            found.append(None if unjudged else Judgement(cast(Verdict, first), cast(Verdict, second)))
        if pairs and not any(found):
            raise RewardError(f"{next(verdict.why for verdict in verdicts if isinstance(verdict, _Unjudged))}.")
        return found

    def try_out(self) -> None:
        """Let it judge a pair that is easy to judge. Raises InputError where it has no verdict."""
        good, bad = (Rollout(_PROBE, (0,), (0.0,), text, True) for text in ("Bees make honey.", "Bees make bricks."))
        try:
            self._server.ask([self._question(good, bad, skips=False)])
        except RewardError as error:
            raise InputError(str(error)) from error

    def _question(self, first: Rollout, second: Rollout, skips: bool) -> Question[Verdict | _Unjudged]:
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": filled_in(self._settings.prompt or PROMPT, first, second)}],
            **self._settings.request,
        }
        return Question(json.dumps(body).encode(), self._read, partial(self._given_up, first, skips))

    def _read(self, status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
        """An endpoint that refuses a key may quote it: it is taken out before anything is shown."""
        return verdict_of(status, headers, body if self._key is None else body.replace(self._key.encode(), b"(key)"))

    def _given_up(self, first: Rollout, skips: bool, bad: NoAnswerError, tries: int) -> _Unjudged:
        slow = "see that it runs and is fast enough, or raise judge.retries or judge.timeout_seconds"
        wrong = "see judge.url, judge.model, judge.api_key_env, judge.request and judge.prompt"
        why = f"{self.name} {bad} (tries: {tries}) for {sample(first)}; {slow if bad.again else wrong}"
        if not skips:
            skipping = ', or set judge.on_error = "skip" to leave such pairs out'
            raise RewardError(f"{why}{skipping if self._settings.on_error == 'fail' else ''}.")
        return _Unjudged(why)


@dataclass(frozen=True)
class _Unjudged:
    """Why a question has no verdict."""

    why: str


def filled_in(template: str, first: Rollout, second: Rollout) -> str:
    """What the judge is asked of two responses to one prompt. A place named within one of the texts stays as it is."""
    texts = dict(zip(JUDGE_PLACES, (prompt_for_judge(first.prompt), first.text, second.text), strict=True))
    return _PLACES.sub(lambda place: texts[place[0]], template)


def prompt_for_judge(prompt: Prompt) -> str:
    """A conversation turn by turn with its roles, where the prompt was one, without the marks of a chat template."""
    if prompt.messages is None:
        return prompt.text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


def verdict_of(status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
    """The verdict that a chat completion ends with: the last [[A]], [[B]] or [[C]], or one of the letters alone.

    Raises NoAnswerError where there is none.
    """
    content = _content(json_of(status, headers, body))
    if content is None:
        raise NoAnswerError(f"answered with what is no chat completion, {shown_body(body)}", again=False)
    letters = _MARKED.findall(content) or _ALONE.findall(content)
    if not letters:
        raise NoAnswerError(f"answered without a verdict [[A]], [[B]] or [[C]], {shown(content, 200)}", again=False)
    return cast(Verdict, letters[-1])


def _content(answer: Any) -> str | None:
    """The text of the first choice."""
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _key_from(variable: str | None) -> str | None:
    """Raises InputError where the variable is named and holds nothing that can be sent as a key."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        holds = "holds what is no key" if key else "is not set"
        raise InputError(f"judge.api_key_env = {variable!r}: that environment variable {holds}; set it to the key.")
    return key
