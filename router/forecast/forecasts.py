"""Everything that a router has learnt of the times that things take, as one; what of it is shown to operators."""

from __future__ import annotations

from dataclasses import dataclass

from router.fleet.worker_table import WorkerTable
from router.forecast.handoffs import Accuracy, HandoffTimes
from router.forecast.lead import Lead
from router.forecast.steps import KindForecast, StepTimes


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
