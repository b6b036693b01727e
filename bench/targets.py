"""What Baton's engine has to reach beside its peers and the machine, and whether measured figures reach it. Pure.

Figures of one model are {engine: {measure: value}}; measures are the names of workloads in tokens per second, "overhead" and
"load growth" as ratios, and what engine_loads measures in seconds. Engines are baton, transformers, continuous
(transformers' generate_batch), llama.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from workloads import BESIDE_A_BUSY_CORE, DECODES, LONG, SHORT, Workload

Figures = Mapping[str, Mapping[str, float]]

MIN_OVER_TRANSFORMERS = 2.5
MIN_OVER_LLAMA = 1.3
MIN_OVER_LLAMA_AT_BATCH_1 = 1.0
MIN_OF_ROOFLINE = {"dense": 0.8, "big": 0.8, "small": 0.6}
MIN_BESIDE_BUSY_CORE = 0.5
"""No collapse: of two cores one and a half are left, and what a single free core does is a half."""
MAX_OVERHEAD = 0.05
OVERHEAD_AT = DECODES[-1].name
MAX_LOAD_GROWTH = 1.2
MAX_COLD_LOAD_OVER_READ = 1.25
"""At disk speed: reading the same files plainly, and a quarter more."""
MAX_SECOND_LOAD_OVER_LLAMA = 1.0
"""What mapping takes: llama.cpp computes on the mapped file."""


@dataclass(frozen=True)
class Verdict:
    """One target: `value` must be at least (or, `at_most`, at most) `bound`; None where a figure is missing."""

    name: str
    value: float | None
    bound: float
    at_most: bool = False

    @property
    def is_met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def ratio(figures: Figures, measure: str, *peers: str) -> float | None:
    """Baton over the fastest of `peers` that has this figure; None when Baton or all of them lack it."""
    own = figures.get("baton", {}).get(measure)
    others = [value for peer in peers if (value := figures.get(peer, {}).get(measure)) is not None]
    return own / max(others) if own is not None and others else None


def verdicts(model: str, figures: Figures, limits: Mapping[str, float]) -> Iterator[Verdict]:
    """All targets that concern a model; those of long contexts, busy cores and loads only where Baton was measured so.

    `limits` gives the roofline of each workload in tokens per second.
    """
    own = figures.get("baton", {})
    for workload in (*SHORT, *(workload for workload in LONG if workload.name in own)):
        yield from _speeds(model, workload, figures, limits)
    for workload in BESIDE_A_BUSY_CORE:
        if workload.busy_name in own:
            kept = fraction(own[workload.busy_name], own.get(workload.name))
            yield Verdict(f"{workload.busy_name}, over quiet", kept, MIN_BESIDE_BUSY_CORE)
    yield Verdict("overhead at batch 32", own.get("overhead"), MAX_OVERHEAD, at_most=True)
    yield Verdict("load: peak RSS over weights", own.get("load growth"), MAX_LOAD_GROWTH, at_most=True)
    if "cold load, s" in own:
        over_read = fraction(own["cold load, s"], own.get("cold read, s"))
        yield Verdict("cold load over reading the files", over_read, MAX_COLD_LOAD_OVER_READ, at_most=True)
        over_llama = ratio(figures, "second load, s", "llama")
        yield Verdict("second load over llama.cpp's", over_llama, MAX_SECOND_LOAD_OVER_LLAMA, at_most=True)


def _speeds(model: str, workload: Workload, figures: Figures, limits: Mapping[str, float]) -> Iterator[Verdict]:
    measure = workload.name
    if model in MIN_OF_ROOFLINE:
        reached = fraction(figures.get("baton", {}).get(measure), limits.get(measure))
        yield Verdict(f"{measure} over roofline", reached, MIN_OF_ROOFLINE[model])
    is_single = workload.kind == "decode" and workload.batch == 1
    least = MIN_OVER_LLAMA_AT_BATCH_1 if is_single else MIN_OVER_LLAMA
    yield Verdict(f"{measure} over llama.cpp", ratio(figures, measure, "llama"), least)
    over = ratio(figures, measure, "transformers", "continuous")
    yield Verdict(f"{measure} over transformers", over, MIN_OVER_TRANSFORMERS)


def fraction(value: float | None, limit: float | None) -> float | None:
    return value / limit if value is not None and limit else None
