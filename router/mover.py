"""Decides which running requests move to another decode worker: away from workers that drain, leave or switch, and to even out load."""

from __future__ import annotations

from collections.abc import Iterable

from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.flights import Flights
from router.policies.rebalance import DecodeLoad, RebalanceLimits, Rebalancer
from router.progress import Flight
from router.view import WorkerEntry

MIN_TOKENS_LEFT = 16
"""A request that ends soon is not worth a move for the sake of balance."""


class Mover:
    """Begins migrations, at most `max_migrations` at a time; each ends in `router.migrations`."""

    def __init__(self, config: RouterConfig, fleet: Fleet, dispatcher: Dispatcher, flights: Flights) -> None:
        self._config = config
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._flights = flights
        limits = RebalanceLimits(
            config.rebalance_gap,
            config.rebalance_pressed_gap,
            config.rebalance_cooldown_s,
            config.rebalance_moves_per_s,
        )
        self._rebalancer = Rebalancer(limits)

    def run(self, now: float) -> None:
        """Begins what is due now."""
        for entry in self._fleet:
            if entry.must_be_left:
                self._leave(entry, now)
        if self._config.rebalance:
            self._even_out(now)

    @property
    def _has_room(self) -> bool:
        return len(self._flights.migrations) < self._config.max_migrations

    def _leave(self, source: WorkerEntry, now: float) -> None:
        """Moves what runs there; what finds no room elsewhere stays and is looked at again."""
        for flight in self._movable(source, now):
            if not self._has_room:
                return
            target = self._home_for(flight, source)
            if target is not None:
                self._flights.migrations.begin(flight, source, target, now)

    def _even_out(self, now: float) -> None:
        loads = [self._load_of(entry) for entry in self._fleet if entry.can_decode]
        chosen = self._rebalancer.choose(loads, now)
        if chosen is None or not self._has_room:
            return
        source, target = (self._fleet.get(worker_id) for worker_id in chosen)
        if source is None or target is None:
            return
        flights = [f for f in self._movable(source, now) if self._num_left(f) >= MIN_TOKENS_LEFT]
        # The shortest has least to copy.
        for flight in sorted(flights, key=lambda f: (len(f.request.prompt_token_ids) + len(f.delivered), f.order)):
            if self._fits(flight, target):
                self._flights.migrations.begin(flight, source, target, now)
                self._rebalancer.moved(now)
                return

    def _movable(self, source: WorkerEntry, now: float) -> Iterable[Flight]:
        """Requests that decode there: the client has a token of each."""
        return [
            flight
            for flight in self._flights.running_on(source.worker_id)
            if flight.delivered and flight.incoming is None and now >= flight.moves_at_s
        ]

    def _home_for(self, flight: Flight, source: WorkerEntry) -> WorkerEntry | None:
        """The emptiest decode worker that has blocks for it."""
        homes = [e for e in self._fleet if e.can_decode and e is not source and self._fits(flight, e)]
        return min(homes, key=lambda entry: self._load_of(entry).num_sequences, default=None)

    def _fits(self, flight: Flight, target: WorkerEntry) -> bool:
        return target.load.num_free_blocks - target.charges.num_blocks >= self._dispatcher.num_blocks(flight)

    def _load_of(self, entry: WorkerEntry) -> DecodeLoad:
        load, worker_id = entry.load, entry.worker_id
        running = load.num_running + load.num_waiting + load.num_transferring + entry.charges.num_sequences
        preemptions = dict(entry.status.counters).get("preemptions", 0.0) if entry.status else 0.0
        return DecodeLoad(
            worker_id, running - self._flights.migrations.leaving(worker_id), load.num_waiting, preemptions
        )

    def _num_left(self, flight: Flight) -> int:
        return flight.request.params.max_tokens - len(flight.delivered)
