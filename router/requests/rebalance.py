"""Decides when a running request shall move from the fullest decode worker to the emptiest; counts only, no requests.

A move costs both workers a little and evens out two sequences, so there must be a clear difference, or a clear need: the fullest has
requests waiting or preempts them. Once begun it goes on until the two are even, then it rests.
"""

from __future__ import annotations

from dataclasses import dataclass

PRESSURE_S = 3.0
"""Counters of preemptions come about once a second: so long a rise counts as pressure."""
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
    is_active: bool = False
    _rests_until_s: float = 0.0
    _next_move_s: float = 0.0

    def is_due(self, gap: int, is_pressed: bool, now: float) -> bool:
        """A sequence shall move now; tell `moved` if one does.

        `gap` is by how many sequences the fullest decode worker has more than the emptiest; `is_pressed`: it has requests
        waiting, or has just preempted some.
        """
        if self.is_active and gap < EVEN_GAP:
            self.is_active = False
            self._rests_until_s = now + self.limits.cooldown_s
        if not self.is_active:
            needed = self.limits.pressed_gap if is_pressed else self.limits.gap
            self.is_active = gap >= needed and now >= self._rests_until_s
        return self.is_active and now >= self._next_move_s

    def moved(self, now: float) -> None:
        self._next_move_s = now + 1 / self.limits.moves_per_s
