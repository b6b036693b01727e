"""Decides when a running request shall move from the fullest decode worker to the emptiest; counts only, no requests.

A move costs both workers a little and evens out two sequences, so there must be a clear difference, or a clear need: the fullest has
requests waiting or preempts them. Once begun it goes on until the two are even, then it rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PRESSURE_S = 3.0
"""Counters of preemptions come about once a second: so long a rise counts as pressure."""
EVEN_GAP = 2
"""Moving one of two sequences that they differ by makes them even."""


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """A decode worker: what runs there or is on its way there, less what is on its way out. `num_preemptions` is a total."""

    worker_id: str
    num_sequences: int
    num_waiting: int
    num_preemptions: float


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
    is_active: bool = False
    _rests_until_s: float = 0.0
    _next_move_s: float = 0.0
    _preemptions: dict[str, float] = field(default_factory=dict)
    _pressed_until_s: dict[str, float] = field(default_factory=dict)

    def choose(self, workers: Sequence[DecodeLoad], now: float) -> tuple[str, str] | None:
        """(from, to) of a move to make now, of workers in a stable order; tell `moved` if it is made."""
        self._watch(workers, now)
        if len(workers) < 2:
            return None
        fullest = max(workers, key=lambda worker: worker.num_sequences)
        emptiest = min(workers, key=lambda worker: worker.num_sequences)
        gap = fullest.num_sequences - emptiest.num_sequences
        if self.is_active and gap < EVEN_GAP:
            self.is_active = False
            self._rests_until_s = now + self.limits.cooldown_s
        if not self.is_active:
            is_pressed = fullest.num_waiting > 0 or now < self._pressed_until_s.get(fullest.worker_id, 0.0)
            needed = self.limits.pressed_gap if is_pressed else self.limits.gap
            self.is_active = gap >= needed and now >= self._rests_until_s
        if not self.is_active or now < self._next_move_s:
            return None
        return fullest.worker_id, emptiest.worker_id

    def moved(self, now: float) -> None:
        self._next_move_s = now + 1 / self.limits.moves_per_s

    def _watch(self, workers: Sequence[DecodeLoad], now: float) -> None:
        known = self._preemptions
        for worker in workers:
            if worker.num_preemptions > known.get(worker.worker_id, worker.num_preemptions):
                self._pressed_until_s[worker.worker_id] = now + PRESSURE_S
        self._preemptions = {worker.worker_id: worker.num_preemptions for worker in workers}
        present = self._preemptions.keys()
        self._pressed_until_s = {name: until for name, until in self._pressed_until_s.items() if name in present}
