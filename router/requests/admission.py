"""Decides who goes next among the requests of one tenant that have no worker yet. Knows neither workers nor why they wait."""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Place:
    """One stay in the queue; a later stay of the same request has another ticket."""

    priority: int
    due_s: float
    order: int
    ticket: int
    late_s: float
    patient_until_s: float


class AdmissionQueue:
    """Lower priority value first, then whose first token is due first, then first come first served; some entries are not ready yet.
    One that cannot be in time any more is in no hurry: those that still can go first, for a while. Whoever fills it bounds it.
    """

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._ready: list[tuple[int, float, int, int, str]] = []
        self._delayed: list[tuple[float, int, str]] = []
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._places)

    def push(
        self,
        request_id: str,
        priority: int,
        order: int,
        ready_s: float = 0.0,
        due_s: float = 0.0,
        patient_until_s: float = 0.0,
        late_s: float | None = None,
    ) -> None:
        """Adds a request. `order` is its arrival number; before `ready_s` (times are of the clock of `now`) it is passed over.

        `due_s` is when its first token is due. From `late_s` on, which is then unless it is given, it is too late for that, and it stands in
        line as if it were due at `patient_until_s`.
        """
        self._next_ticket += 1
        self._places[request_id] = _Place(
            priority, due_s, order, self._next_ticket, due_s if late_s is None else late_s, patient_until_s
        )
        heapq.heappush(self._delayed, (ready_s, self._next_ticket, request_id))

    def first(self, now: float) -> str | None:
        """The request to run next; it stays in the queue."""
        while self._delayed and self._delayed[0][0] <= now:
            _, ticket, request_id = heapq.heappop(self._delayed)
            place = self._places.get(request_id)
            if place is not None and place.ticket == ticket:
                heapq.heappush(self._ready, (place.priority, place.due_s, place.order, ticket, request_id))
        while self._ready:
            _, due_s, _, ticket, request_id = self._ready[0]
            place = self._places.get(request_id)
            if place is None or place.ticket != ticket:
                heapq.heappop(self._ready)
            elif place.late_s < now and due_s < place.patient_until_s:
                later = (place.priority, place.patient_until_s, place.order, ticket, request_id)
                heapq.heapreplace(self._ready, later)
            else:
                return request_id
        return None

    def remove(self, request_id: str) -> None:
        """Takes a request out; one that is not here is ignored."""
        self._places.pop(request_id, None)
        if len(self._ready) + len(self._delayed) > 2 * len(self._places) + 64:
            tickets = {place.ticket for place in self._places.values()}
            self._ready = [entry for entry in self._ready if entry[3] in tickets]
            self._delayed = [entry for entry in self._delayed if entry[1] in tickets]
            heapq.heapify(self._ready)
            heapq.heapify(self._delayed)
