"""Learns what a handoff of KV adds to a first token, and how well first tokens were foretold; from what requests report when they begin to answer."""

from __future__ import annotations

from collections import deque

import numpy as np

from router.forecast.fit import LinearFit

MAX_UNSEEN = 64
"""Reports between two ticks; what is beyond is not learnt from."""
MAX_RATIOS = 256
PRIOR_S = (6.4e-3, 1e-5)
"""A handoff by itself, and each block that is moved, before anything has been measured."""


class HandoffTimes:
    """Seconds from the end of a prefill elsewhere until its KV is in place, by the blocks that are moved."""

    def __init__(self) -> None:
        self._fit = LinearFit(PRIOR_S)
        self._unseen: list[tuple[int, float]] = []
        self.fixed_s, self.block_s = map(float, self._fit.coefficients)

    @property
    def num_samples(self) -> int:
        return self._fit.num_samples

    def note(self, num_blocks: int, seconds: float) -> None:
        """One handoff has ended so."""
        if seconds > 0 and len(self._unseen) < MAX_UNSEEN:
            self._unseen.append((num_blocks, seconds))

    def learn(self) -> None:
        """Takes what was noted."""
        if not self._unseen:
            return
        noted = np.array(self._unseen, np.float64)
        self._unseen.clear()
        work = np.column_stack([np.ones(len(noted)), noted[:, 0]])
        self._fit.take(work, noted[:, 1])
        self.fixed_s, self.block_s = map(float, self._fit.coefficients)


class Accuracy:
    """Measured seconds in relation to those that were foretold, of the last answers."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=MAX_RATIOS)
        self._num_noted = self._middle_at = 0
        self._middle = 1.0

    def __len__(self) -> int:
        return len(self._ratios)

    def note(self, foretold_s: float, measured_s: float) -> None:
        if foretold_s > 0 and measured_s > 0:
            self._ratios.append(measured_s / foretold_s)
            self._num_noted += 1

    @property
    def middle(self) -> float:
        """The median of the last ratios, worked out now and then; 1 where nothing was measured."""
        if self._num_noted >= self._middle_at:
            self._middle_at = self._num_noted + 16
            self._middle = self.quantiles()[1]
        return self._middle

    def quantiles(self) -> tuple[float, float, float]:
        """p10, p50 and p90; 1 where nothing was measured."""
        if not self._ratios:
            return 1.0, 1.0, 1.0
        low, middle, high = np.quantile(np.array(self._ratios), (0.1, 0.5, 0.9))
        return float(low), float(middle), float(high)
