"""Virtual time: one queue of what happens when. Knows nothing of what happens."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

Call = Callable[..., None]


class Timer:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("args", "at_s", "call")

    def __init__(self, at_s: float, call: Call, args: tuple[Any, ...]) -> None:
        self.at_s = at_s
        self.call: Call | None = call
        self.args = args

    def cancel(self) -> None:
        self.call = None
        self.args = ()


class Timeline:
    """What is due at the same moment happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._queue: list[tuple[float, int, Timer]] = []
        self._soon: deque[tuple[Call, tuple[Any, ...]]] = deque()
        self._number = 0

    def clock(self) -> float:
        """`now`, for who wants a clock."""
        return self.now

    def at(self, at_s: float, call: Call, *args: Any) -> Timer:
        """`call(*args)` at that time, or now if it has passed."""
        timer = Timer(max(at_s, self.now), call, args)
        self._number += 1
        heapq.heappush(self._queue, (timer.at_s, self._number, timer))
        return timer

    def after(self, delay_s: float, call: Call, *args: Any) -> Timer:
        return self.at(self.now + delay_s, call, *args)

    def soon(self, call: Call, *args: Any) -> None:
        """At this very moment, behind what is happening and what was asked for before; cannot be cancelled."""
        self._soon.append((call, args))

    def run(self, until_s: float, is_over: Callable[[], bool], each: Callable[[], None] | None = None) -> None:
        """Until that time, or until `is_over`, or until nothing is left to happen. `each` is called after every event."""
        queue, soon, pop = self._queue, self._soon, heapq.heappop
        while not is_over():
            if soon:
                call, args = soon.popleft()
            elif queue:
                if queue[0][0] > until_s:
                    break
                at_s, _, timer = pop(queue)
                if timer.call is None:
                    continue
                self.now = at_s
                call, args = timer.call, timer.args
            else:
                return
            self.num_events += 1
            call(*args)
            if each is not None:
                each()
        if not is_over():
            self.now = max(self.now, until_s)
