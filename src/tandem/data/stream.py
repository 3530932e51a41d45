"""Rows that are read while training goes on: no more of them are in memory than a buffer holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any, Generic, Self

from tandem.data.feed import Item, Maker, Place, notes_on
from tandem.data.files import Mark, Reader
from tandem.data.rows import Row, Source, hold_out, no_rows
from tandem.errors import BadRowError, InputError

SAMPLE_ROWS = 64
"""How many rows are tried before training begins, where none of the others is."""


@dataclass
class Cursor:
    """Where a stream stands: passes that are done, windows of this one that are done, the mark at which the present
    window begins, and how many of its rows were taken.

    `of_pass` counts the items that this pass gave; `counts` all of them (`used`), and the rows that were left out.
    """

    buffer_rows: int
    passes: int = 0
    window: int = 0
    mark: Mark = None
    taken: int = 0
    of_pass: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def restored(cls, place: Place) -> Self:
        return cls(**{**place, "counts": Counter(place["counts"])})

    def place(self) -> Place:
        return {**vars(self), "counts": dict(self.counts)}

    def next_window(self, mark: Mark) -> None:
        self.window, self.mark, self.taken = self.window + 1, mark, 0

    def next_pass(self) -> None:
        self.passes, self.window, self.mark, self.taken, self.of_pass = self.passes + 1, 0, None, 0, 0


@dataclass(frozen=True)
class Streamed(Generic[Item]):
    """Items made of rows as they come: a window of `buffer_rows` is read and given in a random order, then the next.

    Rows of one group stay together within a window. The order is drawn anew for each pass and window, from the seed and
    their numbers alone, so that all it takes to go on is the place at which a window begins. From the second pass on
    the first window has a random size, so that windows end elsewhere in each pass. Rows of the groups `held` never
    train.
    """

    source: Source
    maker: Maker[Item]
    buffer_rows: int
    seed: int
    held: frozenset[str]
    sample: Sequence[Item]

    @property
    def count(self) -> None:
        """Nobody has counted them."""

    def check(self, done: int, place: Place) -> None:
        if done and place is None:
            raise InputError("the run was begun with data.streaming = false; go on with it as it was.")
        cursor = self._cursor(place)
        if cursor.buffer_rows != self.buffer_rows:
            raise InputError(
                f"data.buffer_rows = {self.buffer_rows}, and the run was begun with {cursor.buffer_rows}, which decides"
                " what is held out and in which order rows come; go on with it as it was."
            )

    def batches(self, size: int, done: int = 0, place: Place = None) -> Iterator[tuple[list[Item], Place]]:  # noqa: ARG002
        cursor = self._cursor(place)
        items = self._items(cursor)
        while True:
            yield list(islice(items, size)), cursor.place()

    def facts(self, place: Place) -> Mapping[str, Any]:
        cursor = self._cursor(place)
        return {"stream": {"passes": cursor.passes, **cursor.counts}}

    def notes(self, place: Place) -> Sequence[str]:
        if place is None:
            return []
        counts, key = place["counts"], self.source.key
        whole = f"{key}: {counts['used']} rows were trained on, in {place['passes']} whole passes and a part of one."
        return [whole, *notes_on(counts, self.maker.limit, f"{key}: ")]

    def _cursor(self, place: Place) -> Cursor:
        return Cursor(self.buffer_rows) if place is None else Cursor.restored(place)

    def _items(self, cursor: Cursor) -> Iterator[Item]:
        """Items from where the cursor stands, which goes along. Raises InputError where a pass gives none."""
        bad: list[BadRowError] = []
        while True:
            with self.source.open(cursor.mark, streaming=True) as reader:
                while (window := self._window(reader, cursor)) is not None:
                    yield from self._rest_of(window, cursor, bad)
                    cursor.next_window(reader.mark())
                    # Otherwise it would stay while the next one is read.
                    del window
            if cursor.of_pass == 0:
                raise self.maker.nothing_left(self.source, bad)
            cursor.next_pass()

    def _window(self, reader: Reader, cursor: Cursor) -> list[Row | BadRowError] | None:
        """The rows of the next window in the order in which they are given, or None at the source's end."""
        random = Random(f"{self.seed}/{cursor.passes}/{cursor.window}")
        varied = cursor.passes > 0 and cursor.window == 0
        size = random.randint(1, self.buffer_rows) if varied else self.buffer_rows
        rows = list(islice(rows_of(self.source, reader), size))
        if not rows:
            return None
        groups: dict[str, list[Row | BadRowError]] = {}
        for row in rows:
            groups.setdefault(group_of(row, self.maker), []).append(row)
        kept = [group for name, group in groups.items() if name not in self.held]
        random.shuffle(kept)
        return [row for group in kept for row in group]

    def _rest_of(self, window: Sequence[Row | BadRowError], cursor: Cursor, bad: list[BadRowError]) -> Iterator[Item]:
        for row in islice(window, cursor.taken, None):
            cursor.taken += 1
            try:
                item = self.maker.of(row, cursor.counts, bad)
            except BadRowError as error:
                raise self.maker.refusal(error) from None
            if item is not None:
                cursor.of_pass += 1
                cursor.counts["used"] += 1
                yield item


def open_stream(
    source: Source, maker: Maker[Item], buffer_rows: int, seed: int, fraction: float, counts: Counter[str]
) -> tuple[Streamed[Item], list[Item]]:
    """A stream, and what is held out of it: so large a fraction of its first window.

    What was held out, or the first few rows where nothing is, is looked at now, so that a source of another kind is
    refused at once, and `counts` what becomes of it. Raises InputError for a source that can only be read whole, or
    has no rows that can be used.
    """
    if any(path.suffix.lower() == ".json" for path in source.files()):
        raise InputError(
            f"{source}: a .json file is one list, which can only be read whole; for data.streaming write each row in a "
            "line of its own, and let the file's name end in .jsonl."
        )
    with source.open(streaming=True) as reader:
        first = list(islice(rows_of(source, reader), buffer_rows if fraction else min(buffer_rows, SAMPLE_ROWS)))
    if not first:
        raise no_rows(source)
    training, kept = hold_out(first, fraction, seed, lambda row: group_of(row, maker))
    heldout = maker.all_of(kept, source, counts) if kept else []
    # These are counted when they train.
    sample = maker.all_of(training[:SAMPLE_ROWS], source, Counter())
    held = frozenset(group_of(row, maker) for row in kept)
    return Streamed(source, maker, buffer_rows, seed, held, sample), heldout


def rows_of(source: Source, reader: Reader) -> Iterator[Row | BadRowError]:
    """The reader's rows; in the place of one that is none, what is wrong with it."""
    while True:
        try:
            yield source.row(next(reader))
        except StopIteration:
            return
        except BadRowError as error:
            yield error


def group_of(row: Row | BadRowError, maker: Maker[Any]) -> str:
    return f"{row}" if isinstance(row, BadRowError) else maker.group(row)
