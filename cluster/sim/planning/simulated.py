"""Asks the simulator what a cluster would do with a trace, several splits at once in processes of their own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

from cluster.sim.load import TraceRequest
from cluster.sim.planning.question import Slo
from cluster.sim.planning.search import Evaluate, Outcome, Split
from cluster.sim.profiles.profile import Profile
from cluster.sim.report.summary import summarize
from cluster.sim.settings import Settings
from cluster.sim.simulation import Simulation
from workers.errors import BatonError

PATIENCE_S = 36_000.0
"""A cluster that is far too small is still simulated to its end: the router's own timeouts end what waits."""


class Simulated:
    """Gives an Evaluate for a profile. Close it: it holds processes."""

    def __init__(self, trace: Sequence[TraceRequest], slo: Slo, seed: int, say: Callable[[str], None]) -> None:
        self._trace, self._slo, self._seed, self._say = tuple(trace), slo, seed, say
        count = len(os.sched_getaffinity(0))
        self._pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (self._trace,)) if count > 1 else None
        if self._pool is None:
            _remember(self._trace)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def of(self, profile: Profile) -> Evaluate:
        def evaluate(splits: Sequence[Split]) -> list[Outcome]:
            ask = partial(simulate, profile, self._slo, self._seed)
            outcomes = []
            try:
                for outcome in self._pool.map(ask, splits) if self._pool is not None else map(ask, splits):
                    self._say(f"  {outcome.split}: {outcome.good_share:.1%} good")
                    outcomes.append(outcome)
            except BrokenProcessPool:
                raise BatonError(
                    "a process that simulated ended; there may be too little memory for this trace"
                ) from None
            return outcomes

        return evaluate


_TRACE: tuple[TraceRequest, ...] = ()
"""Of this process: sent once, not with every question."""


def _begin(trace: tuple[TraceRequest, ...]) -> None:
    """What a simulated worker warns of is no news to whoever plans."""
    logging.getLogger("workers").setLevel(logging.ERROR)
    logging.getLogger("router").setLevel(logging.ERROR)
    _remember(trace)


def _remember(trace: tuple[TraceRequest, ...]) -> None:
    global _TRACE
    _TRACE = trace


def simulate(profile: Profile, slo: Slo, seed: int, split: Split) -> Outcome:
    """One cluster over the whole trace of this process."""
    settings = Settings(
        profile=profile,
        num_prefill=split.prefill,
        num_decode=split.decode,
        num_mixed=split.mixed,
        seed=seed,
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        patience_s=PATIENCE_S,
    )
    summary = summarize(Simulation(settings, _TRACE).run())
    busy = sum(use.busy for use in summary.workers) / max(1, len(summary.workers))
    return Outcome(
        split,
        summary.good_share,
        summary.goodput_per_s,
        summary.ttft.p90,
        summary.tpot.p90,
        busy,
        summary.cached_share,
    )
