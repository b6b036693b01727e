"""Takes workers in turn, whatever their load; simple to predict, and the yardstick for other policies."""

from __future__ import annotations

import numpy as np

from router.policies.policy import Candidates, Demand, Route


class RoundRobinPolicy:
    """Decode workers in turn; prefill workers in turn; a decode worker that can prefill (MIXED) does both."""

    def __init__(self, max_prefill_candidates: int = 3) -> None:
        self._max_prefill_candidates = max_prefill_candidates
        self._turn = 0

    def route(self, demand: Demand, candidates: Candidates) -> Route | None:
        decoders = np.flatnonzero(candidates.decodes)
        decoders = decoders[decoders != demand.avoid] if len(decoders) > 1 else decoders
        if not len(decoders):
            return None
        turn, self._turn = self._turn, self._turn + 1
        decode = int(decoders[turn % len(decoders)])
        prefillers = np.flatnonzero(candidates.prefills)
        prefillers = prefillers[prefillers != decode]
        if candidates.computes[decode] or not len(prefillers):
            return Route(decode)
        turned = np.roll(prefillers, -(turn % len(prefillers)))
        return Route(decode, tuple(int(row) for row in turned[: self._max_prefill_candidates]))
