"""Sends a request where the least work is left to do: cached prefixes against load, all counted in tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.fleet.worker_table import Numbers
from router.policies.policy import Candidates, Demand, Route, tie_break

_MISSING_BLOCK = 1 << 40
"""One block without room outweighs every number of tokens; a worker to avoid outweighs every number of blocks."""
_MAX_MISSING = (1 << 20) - 1
_AVOIDED = 1 << 61
_NOT_A_CANDIDATE = np.iinfo(np.int64).max


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

    def route(self, demand: Demand, candidates: Candidates) -> Route | None:
        table = candidates.table
        prefill_cost = self._prefill_cost(demand, candidates)
        missing = demand.num_blocks - candidates.prefixes.in_pool - table.free_blocks
        rank = prefill_cost + self.sequence_cost_tokens * table.num_sequences
        rank += np.clip(missing, 0, _MAX_MISSING) * _MISSING_BLOCK
        decode = self._first(demand, candidates, candidates.decodes, rank, 1)
        if not decode:
            return None
        others = candidates.prefills.copy()
        others[decode[0]] = False
        prefill = self._first(demand, candidates, others, prefill_cost, max(1, self.max_prefill_candidates))
        if prefill and candidates.computes[decode[0]]:
            dearest = prefill_cost[prefill[0]] + self.handoff_cost_tokens
            if prefill_cost[decode[0]] <= dearest:
                return Route(decode[0])
        return Route(decode[0], tuple(prefill[: self.max_prefill_candidates]))

    def _prefill_cost(self, demand: Demand, candidates: Candidates) -> Numbers:
        """Prompt tokens that each worker would compute until this prompt is done."""
        prefixes = candidates.prefixes
        cost = np.maximum(1, demand.num_prompt_tokens - prefixes.cached * demand.block_size)
        cost += candidates.table.prefill_tokens
        if prefixes.in_pool is not prefixes.cached:
            cost += (prefixes.cached - prefixes.in_pool) * self.lower_tier_cost_tokens
        return cost

    def _first(
        self,
        demand: Demand,
        candidates: Candidates,
        may: np.ndarray[tuple[int], np.dtype[np.bool_]],
        rank: Numbers,
        count: int,
    ) -> list[int]:
        """The `count` best of the workers that may, the best first; those that rank alike in the order of `tie_break`."""
        rank = np.where(may, rank, _NOT_A_CANDIDATE)
        if demand.avoid >= 0 and may[demand.avoid]:
            rank[demand.avoid] += _AVOIDED
        worst = rank.min(initial=_NOT_A_CANDIDATE) if count == 1 else _smallest(rank, count)
        places = np.flatnonzero((rank <= worst) & may)
        if len(places) > 1:
            ties = tie_break(demand.key, candidates.table.seeds[places])
            places = places[np.lexsort((ties, rank[places]))]
        return [int(place) for place in places[:count]]


def _smallest(rank: Numbers, count: int) -> np.int64:
    """The `count`-th smallest value, or the largest."""
    place = min(count, len(rank)) - 1
    return np.int64(np.partition(rank, place)[place]) if place >= 0 else np.int64(0)
