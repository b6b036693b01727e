"""Sends a request where the least work is left to do: cached prefixes against load, all counted in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.policies.policy import Demand, Route, WorkerSnapshot, tie_break


@dataclass(frozen=True, slots=True)
class KvAwarePolicy:
    """Decode: room for the KV first, then the lowest cost of uncached prompt + waiting prefill + busy sequences.

    Prefill: the lowest cost of waiting prefill + uncached prompt. `sequence_cost_tokens` is what one more sequence on a
    decode worker is worth in prompt tokens; `lower_tier_cost_tokens` is what it costs to bring back one cached block from host
    memory or disk; `handoff_cost_tokens` is what moving the KV is worth: a decode worker that
    can prefill (MIXED) computes the prompt itself when that is not dearer.
    """

    sequence_cost_tokens: int = 128
    handoff_cost_tokens: int = 64
    lower_tier_cost_tokens: int = 8
    max_prefill_candidates: int = 3

    def route(self, demand: Demand, workers: Sequence[WorkerSnapshot]) -> Route | None:
        decoders = [worker for worker in workers if worker.can_decode]
        if not decoders:
            return None
        decode = min(decoders, key=lambda worker: self._decode_rank(demand, worker))
        prefillers = [worker for worker in workers if worker.can_prefill and worker is not decode]
        prefillers.sort(key=lambda worker: self._prefill_rank(demand, worker))
        if prefillers and decode.can_prefill:
            local = self._prefill_cost(demand, decode)
            if local <= self._prefill_cost(demand, prefillers[0]) + self.handoff_cost_tokens:
                return Route(decode.worker_id)
        candidates = prefillers[: self.max_prefill_candidates]
        return Route(decode.worker_id, tuple(worker.worker_id for worker in candidates))

    def _decode_rank(self, demand: Demand, worker: WorkerSnapshot) -> tuple[bool, int, int, int]:
        in_pool = worker.cached_blocks - worker.lower_blocks
        missing_blocks = max(0, demand.num_blocks - in_pool - worker.free_blocks)
        cost = self._prefill_cost(demand, worker) + self.sequence_cost_tokens * worker.num_sequences
        return worker.avoid, missing_blocks, cost, tie_break(demand.key, worker.worker_id)

    def _prefill_rank(self, demand: Demand, worker: WorkerSnapshot) -> tuple[bool, int, int]:
        return worker.avoid, self._prefill_cost(demand, worker), tie_break(demand.key, worker.worker_id)

    def _prefill_cost(self, demand: Demand, worker: WorkerSnapshot) -> int:
        """Prompt tokens that the worker would compute until this prompt is done."""
        uncached = demand.num_prompt_tokens - worker.cached_blocks * demand.block_size
        return worker.prefill_tokens + max(1, uncached) + worker.lower_blocks * self.lower_tier_cost_tokens
