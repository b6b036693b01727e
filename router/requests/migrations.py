"""Decides what becomes of a request's move from one decode worker to another: both attempts run until the second continues the first.

The outputs of the new home wait until the client has all tokens before them. Tokens depend on nothing but the request, so it does
not matter who said one, only that none is missing: positions fence everything. Knows neither why a request moves nor how KV travels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from router.config import RouterConfig
from router.events import Command, SendMessage
from router.fleet.fleet import Fleet
from router.fleet.worker_entry import WorkerEntry
from router.requests.dispatch import Dispatcher
from router.requests.in_flight import InFlightRequest, MigrationAttempt
from workers.request import FinishReason, Output
from workers.wire.attach import Adopt, Cancel

DEPARTURE_S = 5.0
"""How long a source may take to say that a sequence has left before it is told to forget it."""


@dataclass(frozen=True, slots=True)
class _Departure:
    """An attempt whose successor is running, and that has not said yet that it is over."""

    worker_id: str
    since_s: float


class Migrations:
    """All second attempts. `on_switch(flight)` is called when one becomes the attempt, with its outputs to take in."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        dispatcher: Dispatcher,
        out: list[Command],
        counters: Counter[str],
        on_switch: Callable[[InFlightRequest, MigrationAttempt, float], None],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._out = out
        self._counters = counters
        self._on_switch = on_switch
        self._incoming: dict[str, InFlightRequest] = {}
        self._adopted: set[str] = set()
        """Those of `_incoming` that moved nothing anywhere: they were there before."""
        self._departures: dict[str, _Departure] = {}
        self.has_ended = False
        """There is room for another move since this was last made False."""

    def __len__(self) -> int:
        """Sequences that are being moved; those that are taken up again are not."""
        return len(self._incoming) - len(self._adopted)

    def sources(self) -> list[str]:
        """The workers that sequences are being moved away from, once for each of these."""
        return [flight.worker_id for wire_id, flight in self._incoming.items() if wire_id not in self._adopted]

    def begin(self, flight: InFlightRequest, source: WorkerEntry, target: WorkerEntry, now: float) -> None:
        """Asks `target` to take the running attempt over from `source`."""
        self._out.append(self._dispatcher.submit_migration(flight, source, target, now))
        assert flight.incoming is not None
        self._incoming[flight.incoming.wire_id] = flight
        self._counters["migrations_begun"] += 1

    def take_back(self, flight: InFlightRequest, worker: WorkerEntry, now: float) -> None:
        """A worker whose stream was lost may still run the request, which runs elsewhere again: whichever is further goes on."""
        if worker.connection is None:
            return
        incoming = flight.begin_migration(worker.worker_id, now)
        worker.attempts[incoming.wire_id] = None
        self._incoming[incoming.wire_id] = flight
        self._adopted.add(incoming.wire_id)
        key = self._dispatcher.key_of(incoming.wire_id)
        adopt = Adopt(flight.name, incoming.wire_id, len(flight.delivered), key)
        self._out.append(SendMessage(worker.worker_id, worker.connection, adopt))
        self._counters["adoptions_begun"] += 1

    def take(self, output: Output, worker_id: str, now: float) -> bool:
        """An output that does not belong to a running attempt; False: nor does it belong to a migration."""
        flight = self._incoming.get(output.request_id)
        if flight is None or flight.incoming is None or flight.incoming.worker_id != worker_id:
            return self._take_departed(output, worker_id)
        incoming = flight.incoming
        if output.finish_reason is FinishReason.ERROR:
            self._counters["migrations_refused"] += 1
            self.drop(flight, now, is_known=True)
            return True
        incoming.buffered.append(output)
        incoming.num_tokens += len(output.token_ids)
        if incoming.num_tokens > self._config.max_buffered_tokens:
            self._counters["migrations_overrun"] += 1
            self.drop(flight, now)
        else:
            self.check(flight, now)
        return True

    def check(self, flight: InFlightRequest, now: float) -> None:
        """Switches over as soon as the client has every token that comes before those of the new home."""
        incoming = flight.incoming
        if incoming is not None and incoming.buffered and incoming.buffered[0].position <= len(flight.delivered):
            self._departures[flight.wire_id] = _Departure(flight.worker_id, now)
            self.switch(flight, now)

    def switch(self, flight: InFlightRequest, now: float) -> None:
        """The second attempt is the only one from now on."""
        incoming = flight.incoming
        assert incoming is not None
        self._end(flight, incoming)
        self._counters["migrations_done"] += 1
        self._on_switch(flight, incoming, now)

    def drop(self, flight: InFlightRequest, now: float, is_known: bool = False) -> None:
        """Gives a migration up; the first attempt goes on. `is_known`: the target knows."""
        incoming = flight.incoming
        if incoming is None:
            return
        self._end(flight, incoming)
        flight.moves_at_s = now + self._config.migration_retry_s
        self._dispatcher.end(incoming.worker_id, incoming.wire_id)
        if not is_known:
            self._cancel(incoming.worker_id, incoming.wire_id)

    def _end(self, flight: InFlightRequest, incoming: MigrationAttempt) -> None:
        del self._incoming[incoming.wire_id]
        self._adopted.discard(incoming.wire_id)
        flight.incoming = None
        self.has_ended = True

    def lose_worker(self, worker_id: str, now: float) -> dict[str, str]:
        """Its stream is gone: nothing arrives there any more, and what left it need not say so. Returns the attempts
        that may still run there, with their requests."""
        left: dict[str, str] = {}
        for flight in list(self._incoming.values()):
            if flight.incoming is not None and flight.incoming.worker_id == worker_id:
                self._counters["migrations_lost"] += 1
                left[flight.incoming.wire_id] = flight.request.request_id
                self.drop(flight, now)
        for wire_id in [name for name, departure in self._departures.items() if departure.worker_id == worker_id]:
            del self._departures[wire_id]
            left[wire_id] = ""  # its request goes on elsewhere, or has ended
        return left

    def check_time(self, now: float) -> None:
        for flight in list(self._incoming.values()):
            if flight.incoming is not None and now - flight.incoming.begun_s > self._config.migration_timeout_s:
                self._counters["migrations_timed_out"] += 1
                self.drop(flight, now)
        for wire_id, left in list(self._departures.items()):
            if now - left.since_s > DEPARTURE_S:
                self._end_departure(wire_id)

    def _take_departed(self, output: Output, worker_id: str) -> bool:
        left = self._departures.get(output.request_id)
        if left is None or left.worker_id != worker_id:
            return False
        if output.finish_reason is not None:
            del self._departures[output.request_id]
        else:  # it does not know that the target has landed, and has gone on
            self._end_departure(output.request_id)
        return True

    def _end_departure(self, wire_id: str) -> None:
        self._cancel(self._departures.pop(wire_id).worker_id, wire_id)

    def _cancel(self, worker_id: str, wire_id: str) -> None:
        entry = self._fleet.get(worker_id)
        if entry is not None and entry.connection is not None:
            self._out.append(SendMessage(entry.worker_id, entry.connection, Cancel(wire_id)))
