"""Decides who goes next among the requests that have no worker yet. Knows neither workers nor why they wait."""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Place:
    """One stay in the queue; a later stay of the same request has another ticket."""

    priority: int
    order: int
    ticket: int


class AdmissionQueue:
    """A bounded queue: lower priority value first, then first come first served; some entries are not due yet.

    `max_queue` bounds new requests only: one that is put back after a fault was admitted before, and the number of
    those is bounded by the requests that run.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._places: dict[str, _Place] = {}
        self._ready: list[tuple[int, int, int, str]] = []
        self._delayed: list[tuple[float, int, str]] = []
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._places

    @property
    def is_full(self) -> bool:
        return len(self._places) >= self._max_queue

    def ids(self) -> list[str]:
        """All waiting requests, in no particular order."""
        return list(self._places)

    def push(self, request_id: str, priority: int, order: int, due_s: float = 0.0) -> None:
        """Adds a request. `order` is its arrival number; before `due_s` (same clock as `now`) it is passed over."""
        self._next_ticket += 1
        self._places[request_id] = _Place(priority, order, self._next_ticket)
        heapq.heappush(self._delayed, (due_s, self._next_ticket, request_id))

    def first(self, now: float) -> str | None:
        """The request to run next; it stays in the queue."""
        while self._delayed and self._delayed[0][0] <= now:
            _, ticket, request_id = heapq.heappop(self._delayed)
            place = self._places.get(request_id)
            if place is not None and place.ticket == ticket:
                heapq.heappush(self._ready, (place.priority, place.order, ticket, request_id))
        while self._ready:
            _, _, ticket, request_id = self._ready[0]
            place = self._places.get(request_id)
            if place is not None and place.ticket == ticket:
                return request_id
            heapq.heappop(self._ready)
        return None

    def remove(self, request_id: str) -> None:
        """Takes a request out; one that is not here is ignored."""
        self._places.pop(request_id, None)
        if len(self._ready) + len(self._delayed) > 2 * len(self._places) + 64:
            tickets = {place.ticket for place in self._places.values()}
            self._ready = [entry for entry in self._ready if entry[2] in tickets]
            self._delayed = [entry for entry in self._delayed if entry[1] in tickets]
            heapq.heapify(self._ready)
            heapq.heapify(self._delayed)
