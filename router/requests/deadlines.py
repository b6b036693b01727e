"""Says which requests have to end by now, soonest first. Knows no request, only names."""

from __future__ import annotations

import heapq


class Deadlines:
    """Those that have ended before their time take no more room than those that live."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._ends_s: dict[str, float] = {}

    def add(self, request_id: str, ends_s: float) -> None:
        """`ends_s`: on the clock of `past`."""
        self._ends_s[request_id] = ends_s
        heapq.heappush(self._heap, (ends_s, request_id))

    def remove(self, request_id: str) -> None:
        """The request has ended; one that is not here is ignored."""
        self._ends_s.pop(request_id, None)
        if len(self._heap) > 2 * len(self._ends_s) + 64:
            self._heap = [(ends_s, name) for name, ends_s in self._ends_s.items()]
            heapq.heapify(self._heap)

    def past(self, now: float) -> list[str]:
        """Those whose time has passed; each is told once."""
        found: list[str] = []
        while self._heap and self._heap[0][0] < now:
            ends_s, request_id = heapq.heappop(self._heap)
            if self._ends_s.get(request_id) == ends_s:
                del self._ends_s[request_id]
                found.append(request_id)
        return found
