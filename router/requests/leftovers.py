"""What may still run on workers whose streams were lost: decides what becomes of it when a stream is up again. Knows no queue."""

from __future__ import annotations

from collections.abc import Mapping

from router.events import Command, SendMessage
from router.fleet.fleet import Fleet
from router.fleet.worker_entry import WorkerEntry
from router.requests.in_flight import InFlightRequest
from router.requests.migrations import Migrations
from workers.wire.attach import Cancel


class Leftovers:
    """Attempts with their requests, by worker. A worker lets nothing run for longer than its grace, so nobody waits for it."""

    def __init__(self, fleet: Fleet, migrations: Migrations, out: list[Command]) -> None:
        self._fleet = fleet
        self._migrations = migrations
        self._out = out
        self._left: dict[str, dict[str, str]] = {}

    def add(self, worker_id: str, left: dict[str, str]) -> None:
        """The worker's stream is lost; `left` are the attempts that may still run there, with the names of their requests."""
        if left:
            self._left[worker_id] = left

    def forget(self) -> None:
        """Of workers that are no more."""
        self._left = {
            worker_id: left for worker_id, left in self._left.items() if self._fleet.get(worker_id) is not None
        }

    def find_again(
        self, entry: WorkerEntry, is_same_process: bool, flights: Mapping[str, InFlightRequest], now: float
    ) -> None:
        """A worker's stream is up again. What was left there and runs elsewhere by now goes on wherever it is further; what has
        ended is ended there. One that still waits may be sent there again, where the worker knows it by its name."""
        left = self._left.pop(entry.worker_id, {})
        if not is_same_process or entry.connection is None:
            return
        for wire_id, request_id in left.items():
            flight = flights.get(request_id)
            if flight is None:
                self.end(entry.worker_id, wire_id)
                continue
            flight.history.worker_is_back()
            if flight.wire_id and flight.incoming is None and flight.worker_id != entry.worker_id:
                self._migrations.take_back(flight, entry, now)
            elif not flight.wire_id and flight.left is None:
                flight.left, flight.avoid_worker_id = (entry.worker_id, wire_id), ""
            else:
                self.end(entry.worker_id, wire_id)

    def end(self, worker_id: str, wire_id: str) -> None:
        """Nobody wants what may still run there."""
        entry = self._fleet.get(worker_id)
        if entry is not None and entry.connection is not None:
            self._out.append(SendMessage(entry.worker_id, entry.connection, Cancel(wire_id)))
