"""Numbers the events of a stream, so that a client that has come to one of them gets the rest, exactly, of whichever router.

Chunks of the older endpoints are numbered by how far each choice has come: `17` is a stream of one choice behind its 17th token,
`17,12e` one of two of which the second has ended; `17e,12e+1` counts the events behind the last choice's end. Where a choice's text is
held back no event comes, so an id says all that a client can have. Events of the newer endpoints are simply counted: they are
written token by token.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol

from router.api.job_progress import Choice
from workers.errors import InvalidRequest

MAX_NUMBERED_CHOICES = 64
"""Streams of more have no ids: each would be longer than what it numbers."""
_POSITIONS = re.compile(r"\d{1,9}e?(?:,\d{1,9}e?)*(?:\+\d)?")
_COUNT = re.compile(r"\d{1,9}")


class EventIds(Protocol):
    """What comes up to the event that the client names is left out; everything must be told from the beginning."""

    def mark(self, choice: Choice, chunk: Iterable[str]) -> Iterable[str]:
        """What a choice has just said, with its id; nothing where the client has it. To be taken before the next is asked for."""
        ...

    def last(self, events: Iterable[str]) -> str:
        """The events behind all choices."""
        ...


class NoIds:
    """Of a stream that is too broad."""

    def mark(self, choice: Choice, chunk: Iterable[str]) -> Iterable[str]:
        return chunk

    def last(self, events: Iterable[str]) -> str:
        return "".join(events)


class PositionIds:
    """`after` empty: the client has nothing. Raises InvalidRequest for one that is no id of such a stream."""

    def __init__(self, num_choices: int, after: str = "") -> None:
        self._now = ["0"] * num_choices
        self._after: list[tuple[int, bool]] = []
        self._num_last = 0
        if not after:
            return
        positions, _, last = after.partition("+")
        parts = positions.split(",")
        if not _POSITIONS.fullmatch(after) or len(parts) != num_choices:
            raise _no_id(after)
        self._after = [(int(part.removesuffix("e")), part.endswith("e")) for part in parts]
        self._num_last = int(last or 0)

    def mark(self, choice: Choice, chunk: Iterable[str]) -> Iterable[str]:
        if not chunk:
            return chunk
        now, is_over = self._now, choice.finish_reason is not None
        now[choice.index] = f"{choice.num_drawn}e" if is_over else str(choice.num_drawn)
        if self._after and self._is_known(choice, is_over):
            deque(chunk, maxlen=0)  # what is told next depends on it
            return ()
        return chain((f"id: {now[0] if len(now) == 1 else ','.join(now)}\n",), chunk)

    def _is_known(self, choice: Choice, is_over: bool) -> bool:
        position, has_end = self._after[choice.index]
        return choice.num_drawn < position or (choice.num_drawn == position and (has_end or not is_over))

    def last(self, events: Iterable[str]) -> str:
        behind = ",".join(self._now)
        numbered = [f"id: {behind}+{number}\n{event}" for number, event in enumerate(events, start=1)]
        return "".join(numbered[self._num_last :])


class CountIds:
    """As PositionIds; the first event is number 0."""

    def __init__(self, after: str = "") -> None:
        if after and not _COUNT.fullmatch(after):
            raise _no_id(after)
        self._first = int(after) + 1 if after else 0
        self._next = 0

    def mark(self, choice: Choice, chunk: Iterable[str]) -> Iterable[str]:
        return list(self._number(chunk))

    def _number(self, events: Iterable[str]) -> Iterator[str]:
        for event in events:
            number, self._next = self._next, self._next + 1
            if number >= self._first:
                yield f"id: {number}\n{event}"

    def last(self, events: Iterable[str]) -> str:
        return "".join(self._number(events))


def _no_id(after: str) -> InvalidRequest:
    return InvalidRequest(
        f"{after!r:.80} is the id of no event of this stream; leave it out to have all of it", "after"
    )
