"""Decides which running requests move to another decode worker: away from workers that drain, leave or switch, and to even out load.

A move for the sake of balance costs both workers a little and evens out two sequences, so there must be a clear difference, or a clear need: the
fullest has requests waiting or preempts them. Once begun it goes on until the two are even, then it rests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from router.config import RouterConfig
from router.fleet.fleet import Fleet
from router.fleet.worker_entry import WorkerEntry
from router.fleet.worker_table import NOTHING, Numbers
from router.requests.dispatch import Dispatcher
from router.requests.flights import InFlightRequests
from router.requests.in_flight import InFlightRequest

EVEN_GAP = 2
"""Moving one of two sequences that they differ by makes them even."""


@dataclass(frozen=True, slots=True)
class RebalanceLimits:
    """`gap` and `pressed_gap` are differences in sequences that begin a round, without and with pressure on the fullest."""

    gap: int
    pressed_gap: int
    cooldown_s: float
    moves_per_s: float


@dataclass(slots=True)
class Rebalancer:
    """Holds the hysteresis, the rest between rounds and the rate. `now` is any clock in seconds."""

    limits: RebalanceLimits
    phase: float = 0.0
    """Where this router stands among those that see the same imbalance, from 0 to 1: they begin one after the other, and each then
    hears of what the others have moved."""
    is_active: bool = False
    _rests_until_s: float = 0.0
    _next_move_s: float = 0.0

    def is_due(self, gap: int, is_pressed: bool, now: float, num_routers: int = 1) -> bool:
        """A sequence shall move now; tell `moved` if one does.

        `gap` is by how many sequences the fullest decode worker has more than the emptiest; `is_pressed`: it has requests
        waiting, or has just preempted some. `num_routers` share the rate.
        """
        if self.is_active and gap < EVEN_GAP:
            self.is_active = False
            self._rests_until_s = now + self.limits.cooldown_s
        if not self.is_active:
            needed = self.limits.pressed_gap if is_pressed else self.limits.gap
            self.is_active = gap >= needed and now >= self._rests_until_s
            if self.is_active and num_routers > 1:
                turn_s = now + self.phase * num_routers / self.limits.moves_per_s
                self._next_move_s = max(self._next_move_s, turn_s)
        return self.is_active and now >= self._next_move_s

    def moved(self, now: float, num_routers: int = 1) -> None:
        self._next_move_s = now + num_routers / self.limits.moves_per_s


MIN_TOKENS_LEFT = 16
"""A request that ends soon is not worth a move for the sake of balance."""
_NOBODY = np.iinfo(np.int64).max


class Mover:
    """Begins migrations, at most `max_migrations` at a time; each ends in `router.requests.migrations`."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, dispatcher: Dispatcher, flights: InFlightRequests, phase: float
    ) -> None:
        """`phase` is as the Rebalancer's."""
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
        self._rebalancer = Rebalancer(limits, phase)
        self.num_visited = 0
        """Requests looked at."""

    def run(self, now: float) -> None:
        """Begins what is due now."""
        self.leave(now)
        if self._config.rebalance and self._fleet.table.num_decoding > 1:
            self._even_out(now)

    def leave(self, now: float) -> None:
        """Goes on with emptying workers that have to be left, as far as there is room for moves."""
        for entry in self._fleet.to_leave():
            if not self._has_room:
                break
            self._leave(entry, now)

    @property
    def _has_room(self) -> bool:
        return len(self._flights.migrations) < self._config.max_migrations

    def _leave(self, source: WorkerEntry, now: float) -> None:
        """Moves what runs there; what finds no room elsewhere stays and is looked at again."""
        roomiest: int | None = None
        for flight in self._movable(source, now):
            if not self._has_room:
                return
            if roomiest is None:
                roomiest = self._most_room()
            if self._dispatcher.num_blocks(flight) > roomiest:
                continue
            target = self._home_for(flight)
            if target is not None:
                self._flights.migrations.begin(flight, source, target, now)
                roomiest = None

    def _even_out(self, now: float) -> None:
        table, sequences = self._fleet.table, self._num_sequences()
        fullest = int(np.where(table.can_decode, sequences, -1).argmax())
        emptiest = int(np.where(table.can_decode, sequences, _NOBODY).argmin())
        source, target = self._fleet.at(fullest), self._fleet.at(emptiest)
        is_pressed = source.load.num_waiting > 0 or now < source.pressed_until_s
        gap, num_routers = int(sequences[fullest] - sequences[emptiest]), source.num_others + 1
        if not self._rebalancer.is_due(gap, is_pressed, now, num_routers):
            return
        if not self._has_room:
            return
        room = int(table.free_blocks[emptiest])
        flights = [
            flight
            for flight in self._movable(source, now)
            if self._num_left(flight) >= MIN_TOKENS_LEFT and self._dispatcher.num_blocks(flight) <= room
        ]
        if flights:  # the shortest has least to copy
            shortest = min(flights, key=lambda f: (len(f.request.prompt_token_ids) + len(f.delivered), f.order))
            self._flights.migrations.begin(shortest, source, target, now)
            self._rebalancer.moved(now, num_routers)

    def _movable(self, source: WorkerEntry, now: float) -> Iterable[InFlightRequest]:
        """Requests that decode there: the client has a token of each."""
        flights = self._flights.running_on(source)
        self.num_visited += len(flights)
        return [
            flight for flight in flights if flight.delivered and flight.incoming is None and now >= flight.moves_at_s
        ]

    def _most_room(self) -> int:
        """Free blocks of the decode worker that has most; a source is none, it does not decode any more."""
        table = self._fleet.table
        return int(np.where(table.can_decode, table.free_blocks, -1).max(initial=-1))

    def _home_for(self, flight: InFlightRequest) -> WorkerEntry | None:
        """The emptiest decode worker that has blocks for it."""
        table = self._fleet.table
        fits = (
            table.can_decode
            & (table.takes_blocks > NOTHING)
            & (table.free_blocks >= self._dispatcher.num_blocks(flight))
        )
        if not fits.any():
            return None
        return self._fleet.at(int(np.where(fits, self._num_sequences(), _NOBODY).argmin()))

    def _num_sequences(self) -> Numbers:
        """What is or will be on each worker, less what is on its way out."""
        sequences = self._fleet.table.num_sequences.copy()
        for worker_id in self._flights.migrations.sources():
            entry = self._fleet.get(worker_id)
            if entry is not None:
                sequences[entry.row] -= 1
        return sequences

    def _num_left(self, flight: InFlightRequest) -> int:
        return flight.request.params.max_tokens - len(flight.delivered)
