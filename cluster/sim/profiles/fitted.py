"""The seconds of an engine step as a sum of parts that were fitted to measured steps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Lt

from workers.config import Delay
from workers.errors import BatonError

MAX_TYPICAL_ERROR = 0.10
"""Median of the relative errors above which a fit is refused."""
MAX_LARGE_ERROR = 0.30
"""Nine in ten relative errors must lie below."""


class PoorFit(BatonError):
    """Measured steps do not follow the model of a step."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Each part is its number of seconds times what its name counts."""

    step_s: Delay = 0.0
    """Of every step."""
    prefill_step_s: Delay = 0.0
    """Of a step with prompts."""
    decode_step_s: Delay = 0.0
    """Of a step with decodes."""
    prefill_token_s: Delay = 0.0
    prefill_attended_s: Delay = 0.0
    decode_s: Delay = 0.0
    decode_attended_s: Delay = 0.0
    experts_s: Delay = 0.0
    """Of reading all experts once; a step reads those that at least one of its rows chooses."""
    chosen_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of its layer's experts that a row chooses; 0: the model is dense."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One kind of step and how long it took, the median of several."""

    prefill_tokens: int
    prefill_attended: int
    num_decodes: int
    decode_attended: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A fit and how far it is off: relative errors of the steps that it was made from."""

    cost: FittedCost
    typical_error: float
    """The median."""
    large_error: float
    """Nine in ten are smaller."""
    worst: MeasuredStep


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Implements profile.StepCost."""

    parts: Parts

    def step_s(self, prefill_tokens: int, prefill_attended: int, num_decodes: int, decode_attended: int) -> float:
        parts = self.parts
        seconds = parts.step_s + parts.experts_s * (1 - (1 - parts.chosen_share) ** (prefill_tokens + num_decodes))
        if prefill_tokens:
            seconds += parts.prefill_step_s
            seconds += prefill_tokens * parts.prefill_token_s + prefill_attended * parts.prefill_attended_s
        if num_decodes:
            seconds += parts.decode_step_s + num_decodes * parts.decode_s + decode_attended * parts.decode_attended_s
        return seconds


_PARTS = (
    "step_s",
    "prefill_step_s",
    "decode_step_s",
    "prefill_token_s",
    "prefill_attended_s",
    "decode_s",
    "decode_attended_s",
    "experts_s",
)


def fit(steps: Sequence[MeasuredStep], chosen_share: float = 0.0) -> Fit:
    """The parts, none below zero, with the least sum of squared relative errors. Raises PoorFit in one sentence.

    With so few parts the best is found by trying every set of them that may be above zero.
    """
    counts = np.array([_counts(step, chosen_share) for step in steps], dtype=np.float64)
    seconds = np.array([step.seconds for step in steps], dtype=np.float64)
    if len(steps) < len(_PARTS) or not (seconds > 0).all():
        raise PoorFit(f"a fit needs at least {len(_PARTS)} measured steps that took some time; there are {len(steps)}")
    found = _least_squares(counts / seconds[:, None])
    errors = np.abs(counts @ found / seconds - 1)
    cost = FittedCost(Parts(**dict(zip(_PARTS, map(float, found), strict=True)), chosen_share=chosen_share))
    made = Fit(cost, float(np.median(errors)), float(np.quantile(errors, 0.9)), steps[int(np.argmax(errors))])
    if made.typical_error > MAX_TYPICAL_ERROR or made.large_error > MAX_LARGE_ERROR:
        worst = made.worst
        raise PoorFit(
            f"the measured steps do not follow a sum of parts: relative errors are {made.typical_error:.0%} in the middle and "
            f"{made.large_error:.0%} at nine in ten (bounds {MAX_TYPICAL_ERROR:.0%} and {MAX_LARGE_ERROR:.0%}), the worst with "
            f"{worst.prefill_tokens} prompt tokens and {worst.num_decodes} decodes; measure again when nothing else runs here"
        )
    return made


def _counts(step: MeasuredStep, chosen_share: float) -> tuple[float, ...]:
    """What each part is multiplied with."""
    rows = step.prefill_tokens + step.num_decodes
    return (
        1.0,
        float(step.prefill_tokens > 0),
        float(step.num_decodes > 0),
        step.prefill_tokens,
        step.prefill_attended,
        step.num_decodes,
        step.decode_attended,
        1 - (1 - chosen_share) ** rows,
    )


def _least_squares(relative: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """x >= 0 with the least |relative @ x - 1|^2."""
    num_steps, num_parts = relative.shape
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    scaled, ones = relative / scale, np.ones(num_steps)
    best, best_error = np.zeros(num_parts), float(num_steps)
    for size in range(1, num_parts + 1):
        for chosen in map(list, combinations(range(num_parts), size)):
            some, *_ = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)
            error = float(((scaled[:, chosen] @ some - 1) ** 2).sum())
            if (some >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(num_parts), error
                best[chosen] = some
    found: npt.NDArray[np.float64] = best / scale
    return found
