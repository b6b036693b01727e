"""Where a session's driver waits: for the next event or for the session's next deadline, whichever comes first. Knows no session and no clock."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from workers.errors import InvariantViolated

E = TypeVar("E")

MAX_EVENTS = 1024
"""That may wait for a session at either end of a handoff."""


class Mailbox(Generic[E]):
    """Events in order, for one reader on one event loop.

    `put` waits while `capacity` events wait to be read. `post` does not, so it is for events whose number something else
    bounds: the answers to the reader's own commands. `max_waiting` says that bound; when it does not hold, which is a fault of
    ours, no poster waits or fails: the reader does.
    """

    def __init__(self, capacity: int, max_waiting: int) -> None:
        self._capacity, self._max_waiting = capacity, max_waiting
        self._is_overrun = False
        self._events: deque[E] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._events)

    def post(self, event: E) -> None:
        if len(self._events) < self._max_waiting:
            self._events.append(event)
        else:
            self._is_overrun = True
        _wake(self._reader)

    async def put(self, event: E) -> None:
        """For one writer at a time."""
        while len(self._events) >= self._capacity:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        self.post(event)

    def next_now(self) -> E | None:
        """The next event, if one waits. Raises InvariantViolated when more waited than can be."""
        if self._is_overrun:
            raise InvariantViolated(f"more than {self._max_waiting} events of a handoff waited to be read")
        if not self._events:
            return None
        event = self._events.popleft()
        _wake(self._room)
        return event

    async def next(self, timeout_s: float | None = None) -> E | None:
        """The next event; None when it has not come within `timeout_s` (None: waits for ever). Raises as `next_now`."""
        if not self._events and not self._is_overrun:
            loop = asyncio.get_running_loop()
            self._reader = reader = loop.create_future()
            timer = None
            if timeout_s is not None:
                timer = loop.call_later(max(0.0, timeout_s), _wake, reader)
            try:
                await reader
            finally:
                self._reader = None
                if timer is not None:
                    timer.cancel()
        return self.next_now()


def time_left(deadline_s: float | None, now: float) -> float | None:
    """Until a deadline, of the same clock as `now`; None: there is none."""
    return None if deadline_s is None else deadline_s - now


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
