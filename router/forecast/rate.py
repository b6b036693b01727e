"""How often something has happened lately; old happenings fade. Knows no clock."""

from __future__ import annotations

import math

WINDOW_S = 10.0
"""What happened so long ago counts a third."""


class Rate:
    """`now` is any clock in seconds that does not go back."""

    def __init__(self) -> None:
        self._count = 0.0
        self._counted_s = 0.0
        self._begun_s: float | None = None

    def note(self, now: float, count: float = 1.0) -> None:
        """It has happened so often just now."""
        if self._begun_s is None:
            self._begun_s = now
        self._count = self._count * math.exp((self._counted_s - now) / WINDOW_S) + count
        self._counted_s = now

    def per_s(self, now: float) -> float:
        """Happenings a second; 0: none yet, or none for long."""
        if self._begun_s is None:
            return 0.0
        seen_s = max(1.0, now - self._begun_s)
        window_s = WINDOW_S * (1 - math.exp(-seen_s / WINDOW_S))
        return self._count * math.exp((self._counted_s - now) / WINDOW_S) / window_s
