"""Takes workers in turn, whatever their load; simple to predict, and the yardstick for other policies."""

from __future__ import annotations

from collections.abc import Sequence

from router.policies.policy import Demand, Route, WorkerSnapshot


class RoundRobinPolicy:
    """Decode workers in turn; prefill workers in turn; a decode worker that can prefill (MIXED) does both."""

    def __init__(self, max_prefill_candidates: int = 3) -> None:
        self._max_prefill_candidates = max_prefill_candidates
        self._turn = 0

    def route(self, demand: Demand, workers: Sequence[WorkerSnapshot]) -> Route | None:
        decoders = [worker for worker in workers if worker.can_decode]
        decoders = [worker for worker in decoders if not worker.avoid] or decoders
        if not decoders:
            return None
        turn, self._turn = self._turn, self._turn + 1
        decode = decoders[turn % len(decoders)]
        prefillers = [worker.worker_id for worker in workers if worker.can_prefill and worker is not decode]
        if decode.can_prefill or not prefillers:
            return Route(decode.worker_id)
        start = turn % len(prefillers)
        turned = prefillers[start:] + prefillers[:start]
        return Route(decode.worker_id, tuple(turned[: self._max_prefill_candidates]))
