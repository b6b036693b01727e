"""Everything that a router has learnt of the times that things take, as one; what of it is shown to operators. Knows no clock."""

from __future__ import annotations

from dataclasses import dataclass

from router.fleet.worker_table import WorkerTable
from router.forecast.handoffs import Accuracy, HandoffTimes
from router.forecast.steps import KindForecast, StepTimes

FADE = 0.98
"""What each sample leaves of the weight of earlier ones: about the last fifty count."""
ENOUGH = 8.0
"""Weight below which nothing is foretold."""


class Lead:
    """Learns how long it takes from when a request goes to its workers until its first token, by the length of its prompt: a line through
    what was measured lately, by least squares; neither its slope nor where it begins is below 0."""

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


@dataclass(frozen=True, slots=True)
class ForecastStatus:
    """What is known now. Seconds; `ttft_ratios`: p10, p50 and p90 of measured first tokens over foretold ones."""

    kinds: tuple[KindForecast, ...] = ()
    handoff_s: float = 0.0
    handoff_block_s: float = 0.0
    num_handoffs: int = 0
    ttft_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)
    num_ttft: int = 0


class Forecasts:
    """The predictors of one router. `learn` is called with each tick; what is noted between two ticks waits, within bounds."""

    def __init__(self) -> None:
        self.steps = StepTimes()
        self.handoffs = HandoffTimes()
        self.ttft = Accuracy()
        self.lead = Lead()

    def learn(self, table: WorkerTable) -> None:
        self.steps.learn(table)
        self.handoffs.learn()

    def status(self) -> ForecastStatus:
        handoffs = self.handoffs
        return ForecastStatus(
            self.steps.forecasts(),
            handoffs.fixed_s,
            handoffs.block_s,
            handoffs.num_samples,
            self.ttft.quantiles(),
            len(self.ttft),
        )
