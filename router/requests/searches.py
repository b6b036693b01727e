"""Asks all workers what they have of a job, and gathers what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.events import Command, SendMessage, TellFound
from router.fleet.fleet import Fleet
from router.job_part import FoundJob
from router.requests.in_flight import InFlightRequest
from workers.wire.attach import Find, Found, FoundRequest

NUM_RELAYS = 2
"""So many workers tell the other routers that a job has been ended: one may be about to die."""


@dataclass(slots=True)
class _Search:
    begun_s: float
    waiting: set[str]
    """Workers that have not answered."""
    is_waiting: bool
    ends: bool
    ticket: bytes = b""
    requests: dict[str, tuple[str, FoundRequest]] = field(default_factory=dict)


class Searches:
    """A search ends when all has been found, when every worker has answered or is lost, or after `timeout_s`. Appends to `out`."""

    def __init__(self, fleet: Fleet, timeout_s: float, out: list[Command]) -> None:
        self._fleet = fleet
        self._timeout_s = timeout_s
        self._out = out
        self._searches: dict[int, _Search] = {}

    def begin(self, number: int, job: str, ends: bool, waiting: Sequence[InFlightRequest], now: float) -> None:
        """`waiting`: what waits at this router of the job, which goes into the answer."""
        asked = [entry for entry in self._fleet if entry.is_up and entry.connection is not None]
        tickets = [flight.part.kept.ticket for flight in waiting if flight.part.kept is not None]
        ticket = next(filter(None, tickets), b"")
        self._searches[number] = _Search(now, {entry.worker_id for entry in asked}, bool(waiting), ends, ticket)
        for place, entry in enumerate(asked):
            assert entry.connection is not None
            find = Find(number, job, ends, relays=ends and place < NUM_RELAYS)
            self._out.append(SendMessage(entry.worker_id, entry.connection, find))
        if not asked:
            self._end(number)

    def take(self, worker_id: str, found: Found) -> None:
        search = self._searches.get(found.number)
        if search is None or worker_id not in search.waiting:
            return
        search.waiting.discard(worker_id)
        search.ticket = search.ticket or found.ticket
        search.is_waiting = search.is_waiting or found.is_waiting
        for each in found.requests:
            known = search.requests.get(each.name)
            if known is None or _worth(each) > _worth(known[1]):
                search.requests[each.name] = worker_id, each
        is_all = bool(search.ticket) and len(search.requests) >= found.num_requests > 0
        if not search.waiting or (is_all and not search.ends):
            self._end(found.number)

    def lose_worker(self, worker_id: str) -> None:
        for number, search in list(self._searches.items()):
            search.waiting.discard(worker_id)
            if not search.waiting:
                self._end(number)

    def check_time(self, now: float) -> None:
        for number, search in list(self._searches.items()):
            if now - search.begun_s >= self._timeout_s:
                self._end(number)

    def _end(self, number: int) -> None:
        search = self._searches.pop(number)
        self._out.append(TellFound(number, FoundJob(search.ticket, search.requests, search.is_waiting)))


def _worth(request: FoundRequest) -> tuple[bool, bool, int]:
    return request.is_whole, request.finish_reason is not None, request.num_tokens
