"""Learns how long it takes from when a request goes to its workers until its first token, by the length of its prompt. Knows no workers and no clock."""

from __future__ import annotations

FADE = 0.98
"""What each sample leaves of the weight of earlier ones: about the last fifty count."""
ENOUGH = 8.0
"""Weight below which nothing is foretold."""


class Lead:
    """A line through what was measured lately, by least squares; neither its slope nor where it begins is below 0."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, num_tokens: float, seconds: float) -> None:
        """A prompt of so many uncached tokens took so long."""
        sums = (self._weight, self._x, self._y, self._xx, self._xy)
        new = (1.0, num_tokens, seconds, num_tokens * num_tokens, num_tokens * seconds)
        self._weight, self._x, self._y, self._xx, self._xy = (FADE * a + b for a, b in zip(sums, new, strict=True))

    def expect(self, num_tokens: float) -> float:
        """Seconds; 0: too little was measured."""
        if self._weight < ENOUGH:
            return 0.0
        x, y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - x * x
        slope = max(0.0, (self._xy / self._weight - x * y) / variance) if variance > 1e-6 * x * x else 0.0
        slope = min(slope, y / x) if x else 0.0
        return y + slope * (num_tokens - x)
