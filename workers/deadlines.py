"""Says which requests have to end by now, soonest first. Knows no request, only names."""

from __future__ import annotations

import heapq
from math import inf
from typing import Any, Generic, TypeVar

Name = TypeVar("Name", bound=Any)
"""Of one kind that can be ordered: numbers, or texts."""


class Deadlines(Generic[Name]):
    """Those that have ended before their time take no more room than those that live."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, Name]] = []
        self._ends_s: dict[Name, float] = {}

    def add(self, request_id: Name, ends_s: float) -> None:
        """`ends_s`: on the clock of `past`."""
        self._ends_s[request_id] = ends_s
        heapq.heappush(self._heap, (ends_s, request_id))

    def remove(self, request_id: Name) -> None:
        """The request has ended; one that is not here is ignored."""
        self._ends_s.pop(request_id, None)
        if len(self._heap) > 2 * len(self._ends_s) + 64:
            self._heap = [(ends_s, name) for name, ends_s in self._ends_s.items()]
            heapq.heapify(self._heap)

    @property
    def next_due_s(self) -> float:
        """When the next one has to end; infinity: none has to."""
        while self._heap and self._ends_s.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else inf

    def past(self, now: float) -> list[Name]:
        """Those whose time has come; each is told once."""
        found: list[Name] = []
        while self.next_due_s <= now:
            _, request_id = heapq.heappop(self._heap)
            del self._ends_s[request_id]
            found.append(request_id)
        return found
