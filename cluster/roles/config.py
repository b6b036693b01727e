"""The settings of the role controller: whether it acts, what it aims at, and every bound that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from workers.config import Count, Seconds, Share
from workers.errors import InvalidConfig

AUTO_WORKERS = 3
"""With so many workers `baton serve` lets the controller act unless it is told otherwise."""


@dataclass(frozen=True, slots=True)
class RolesConfig:
    """Times in seconds. Orders of operators are carried out in every mode."""

    mode: Literal["default", "off", "advise", "auto"] = "default"
    """off: roles change by order only. advise: says what it would change. auto: changes it. default: auto with three workers or more, else off."""
    ttft_slo_s: Seconds = 2.0
    """What it aims at where router.ttft_target_s says nothing: from arrival to the first token."""
    tpot_slo_s: Seconds = 0.1
    """The same between two tokens, where router.tpot_target_s says nothing."""
    min_prefill: Count = 1
    """Workers that can prefill (PREFILL or MIXED) stay at least so many."""
    min_decode: Count = 1
    """The same of workers that can decode (DECODE or MIXED)."""
    interval_s: Annotated[float, Ge(0.1), Le(60)] = 1.0
    """Between two looks at the load."""
    min_gain: Share = 0.06
    """A change must promise this share more of good requests than roles as they are."""
    cooldown_s: Seconds = 4.0
    """Between two changes."""
    reversal_s: Seconds = 30.0
    """Between changes in opposite directions, unless much is to be gained."""
    worker_rest_s: Seconds = 15.0
    """A worker that has switched stays as it is for so long."""
    manual_rest_s: Seconds = 300.0
    """The same after an operator has switched it; --pin keeps it for good."""
    switches_per_hour: Annotated[float, Ge(1), Le(36000)] = 60.0
    """Of a worker, on average over all of them and in the long run. What was not used is saved up, up to two switches for each worker."""
    max_at_once: Share = 0.34
    """Of the workers may be switching at the same time; one always may."""
    drain_timeout_s: Seconds = 20.0
    """What runs on a worker must have moved away by then, or the switch is undone. An operator's goes on: what is left runs to its end there."""
    step_timeout_s: Seconds = 10.0
    """A worker must have taken a role, or taken work again, by then, or the switch is undone."""
    audit_records: Annotated[int, Ge(16), Le(4096)] = 256
    """Steps of switches that the store keeps."""
    decisions: Annotated[int, Ge(1), Le(64)] = 16
    """Decisions that the store keeps, with their inputs and alternatives."""

    def acts_on(self, num_workers: int) -> bool:
        """Whether the controller changes roles by itself in a cluster of so many workers."""
        return self.mode == "auto" or (self.mode == "default" and num_workers >= AUTO_WORKERS)

    def watches(self, num_workers: int) -> bool:
        """Whether it decides at all, be it to advise."""
        return self.mode == "advise" or self.acts_on(num_workers)

    def __post_init__(self) -> None:
        if self.reversal_s < self.cooldown_s:
            raise InvalidConfig(
                f"roles.reversal_s must be at least roles.cooldown_s ({self.cooldown_s:g}); it is {self.reversal_s:g}"
            )
