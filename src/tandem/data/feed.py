"""What trains, in the order in which it does: items for ever, the same every time, from any place on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from tandem.data.rows import Row, Source
from tandem.errors import BadRowError, InputError

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
Place = Any
"""Where a feed stands, as JSON can hold it; None where the number of minibatches says it."""


class Feed(Protocol[Item_co]):
    """Items to train on. `sample` holds some of them, to try things on; `count` tells how many there are, where they
    were counted."""

    @property
    def sample(self) -> Sequence[Item_co]: ...

    @property
    def count(self) -> int | None: ...

    def batches(self, size: int, done: int = 0, place: Place = None) -> Iterator[tuple[Sequence[Item_co], Place]]:
        """Minibatches for ever, each with the place after it, once so many are done, which led to the place.

        A minibatch may span two passes. Raises InputError for rows that cannot be used and were not read before.
        """
        ...

    def check(self, done: int, place: Place) -> None:
        """Raises InputError where a run came to the place by another order than this feed's."""
        ...

    def facts(self, place: Place) -> Mapping[str, Any]:
        """What was read on the way to the place, where it was not counted beforehand."""
        ...

    def notes(self, place: Place) -> Sequence[str]:
        """The same for the person to read."""
        ...


@dataclass(frozen=True)
class InMemory(Generic[Item]):
    """All items at once; `order` begins the same order each time it is asked for, pass after pass."""

    items: Sequence[Item]
    order: Callable[[], Iterator[Item]]

    @property
    def sample(self) -> Sequence[Item]:
        return self.items

    @property
    def count(self) -> int:
        return len(self.items)

    def check(self, done: int, place: Place) -> None:  # noqa: ARG002
        if place is not None:
            raise InputError("the run was begun with data.streaming = true; go on with it as it was.")

    def batches(self, size: int, done: int = 0, place: Place = None) -> Iterator[tuple[list[Item], Place]]:  # noqa: ARG002
        items = islice(self.order(), done * size, None)
        while True:
            yield list(islice(items, size)), None

    def facts(self, place: Place) -> Mapping[str, Any]:  # noqa: ARG002
        return {}

    def notes(self, place: Place) -> Sequence[str]:  # noqa: ARG002
        return []


@dataclass(frozen=True)
class Maker(Generic[Item]):
    """How a row becomes an item.

    `make` gives None for a row that is left out for its length, and counts what it does; rows that are not to be parted
    have the same `group`. `bad_rows` says what becomes of a row that cannot be used; `limit` is the setting that rows
    are too long for.
    """

    make: Callable[[Row, Counter[str]], Item | None]
    group: Callable[[Row], str]
    bad_rows: str
    limit: str

    def all_of(self, rows: Sequence[Row | BadRowError], source: Source, counts: Counter[str]) -> list[Item]:
        """What the rows make, but for those that are left out, which are counted.

        Raises InputError where none is left.
        """
        bad: list[BadRowError] = []
        made = [item for row in rows if (item := self.of(row, counts, bad)) is not None]
        if not made:
            raise self.nothing_left(source, bad)
        return made

    def of(self, row: Row | BadRowError, counts: Counter[str], bad: list[BadRowError]) -> Item | None:
        """What a row makes, or None where it is left out; the first that is dropped as bad goes into `bad`.

        Raises BadRowError for a bad row that is not to be dropped.
        """
        try:
            if isinstance(row, BadRowError):
                raise row
            return self.make(row, counts)
        except BadRowError as error:
            if self.bad_rows == "refuse":
                raise
            counts["bad"] += 1
            bad.extend([error] if not bad else [])
            return None

    def refusal(self, error: BadRowError) -> InputError:
        """A bad row met in a stream, with the way to go on without it."""
        said = str(error)
        return InputError(said if "data.bad_rows" in said else f'{said} data.bad_rows = "drop" leaves such rows out.')

    def nothing_left(self, source: Source, bad: Sequence[BadRowError]) -> InputError:
        first = f" The first bad one: {bad[0]}" if bad else ""
        return InputError(
            f"{source}: no row is left: all were dropped as bad (data.bad_rows) or longer than {self.limit}; raise it, "
            f"or give other rows.{first}"
        )


@dataclass(frozen=True)
class SplitRows(Generic[Item]):
    """What trains, what is held out, the longest of either in tokens, and how many rows were truncated, dropped for
    their length or dropped as bad on the way; `notes` say so, and whatever else the person should know."""

    train: Feed[Item]
    heldout: list[Item]
    longest: int
    counts: Counter[str]
    notes: list[str]


def notes_on(counts: Mapping[str, int], setting: str, named: str = "") -> list[str]:
    """What happened to rows that are not as they were given, for the person to read; `setting` limits their length."""
    said = {
        "truncated": f"rows were longer than {setting} and truncated.",
        "dropped": f"rows were longer than {setting} and dropped.",
        "bad": "rows could not be used and were dropped (data.bad_rows).",
    }
    return [f"{named}{counts[name]} {what}" for name, what in said.items() if counts.get(name)]
