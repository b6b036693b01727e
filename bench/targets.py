"""What Baton's engine has to reach beside its peers, and whether measured figures reach it. Pure.

Figures of one model are {engine: {measure: value}}; measures are "prefill N" and "decode B" in tokens per second, and
"overhead", "load growth" as ratios. Engines are baton, transformers, continuous (transformers' generate_batch), llama.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Figures = Mapping[str, Mapping[str, float]]

PREFILLS = (512, 2048)
BATCHES = (1, 8, 32)
WORKLOADS = (*(f"prefill {n}" for n in PREFILLS), *(f"decode {b}" for b in BATCHES))

MIN_PREFILL_OVER_FASTEST = 1.3
MIN_BATCHED_DECODE = {"transformers": 3.0, "llama": 1.5}
MIN_SINGLE_DECODE_OVER_LLAMA = {"dense": 1.0, "big": 1.0, "small": 0.7}
MIN_DENSE_ROOFLINE = 0.7
MAX_OVERHEAD = 0.05
MAX_LOAD_GROWTH = 1.2


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
    """All targets that concern a model. `limits` gives the roofline of each workload in tokens per second."""
    own = figures.get("baton", {})
    for batch in (8, 32):
        measure = f"decode {batch}"
        least = MIN_BATCHED_DECODE["transformers"]
        yield Verdict(f"{measure} over transformers", ratio(figures, measure, "transformers", "continuous"), least)
        yield Verdict(f"{measure} over llama.cpp", ratio(figures, measure, "llama"), MIN_BATCHED_DECODE["llama"])
    if model in MIN_SINGLE_DECODE_OVER_LLAMA:
        least = MIN_SINGLE_DECODE_OVER_LLAMA[model]
        yield Verdict("decode 1 over llama.cpp", ratio(figures, "decode 1", "llama"), least)
    for num_tokens in PREFILLS:
        measure = f"prefill {num_tokens}"
        fastest = ratio(figures, measure, "transformers", "llama")
        yield Verdict(f"{measure} over the faster peer", fastest, MIN_PREFILL_OVER_FASTEST)
    if model == "dense":
        reached = fraction(own.get("decode 1"), limits.get("decode 1"))
        yield Verdict("decode 1 over roofline", reached, MIN_DENSE_ROOFLINE)
    yield Verdict("overhead at batch 32", own.get("overhead"), MAX_OVERHEAD, at_most=True)
    yield Verdict("load: peak RSS over weights", own.get("load growth"), MAX_LOAD_GROWTH, at_most=True)


def fraction(value: float | None, limit: float | None) -> float | None:
    return value / limit if value is not None and limit else None
