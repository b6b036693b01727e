"""The policy over columns of numbers chooses as the plain one over one worker after another does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet.prefix_index import Prefixes
from router.fleet.worker_table import WorkerTable
from router.policies.kv_aware import KvAwarePolicy
from router.policies.policy import Candidates, Demand, tie_break


@dataclass(frozen=True)
class Plain:
    """One worker, as a reader of the policy's description would write it down."""

    row: int
    decodes: bool
    prefills: bool
    num_sequences: int
    prefill_tokens: int
    free_blocks: int
    cached: int
    in_pool: int
    tie: int


def plain_route(demand: Demand, workers: list[Plain], policy: KvAwarePolicy) -> tuple[int, tuple[int, ...]] | None:
    def prefill_cost(worker: Plain) -> int:
        uncached = max(1, demand.num_prompt_tokens - worker.cached * demand.block_size)
        return worker.prefill_tokens + uncached + (worker.cached - worker.in_pool) * policy.lower_tier_cost_tokens

    def decode_rank(worker: Plain) -> tuple[bool, int, int, int]:
        missing = max(0, demand.num_blocks - worker.in_pool - worker.free_blocks)
        cost = prefill_cost(worker) + policy.sequence_cost_tokens * worker.num_sequences
        return worker.row == demand.avoid, missing, cost, worker.tie

    decoders = [worker for worker in workers if worker.decodes]
    if not decoders:
        return None
    decode = min(decoders, key=decode_rank)
    others = [worker for worker in workers if worker.prefills and worker is not decode]
    others.sort(key=lambda worker: (worker.row == demand.avoid, prefill_cost(worker), worker.tie))
    if others and decode.prefills and prefill_cost(decode) <= prefill_cost(others[0]) + policy.handoff_cost_tokens:
        return decode.row, ()
    return decode.row, tuple(worker.row for worker in others[: policy.max_prefill_candidates])


numbers = st.integers(0, 3)
worker_states = st.tuples(
    st.booleans(), st.booleans(), numbers, st.integers(0, 200), st.integers(-2, 12), st.integers(0, 4), numbers
)


@settings(max_examples=400, deadline=None)
@given(st.lists(worker_states, max_size=9), st.integers(0, 2**64 - 1), st.integers(1, 300), st.integers(-1, 8), numbers)
def test_both_choose_alike(
    states: list[tuple[bool, bool, int, int, int, int, int]], key: int, num_prompt: int, avoid: int, num_prefill: int
) -> None:
    table = WorkerTable()
    for index in range(len(states)):
        table.add(f"w-{index}")
    cached = np.zeros(len(states), np.int64)
    in_pool = np.zeros(len(states), np.int64)
    ties = tie_break(key, table.seeds)
    workers = []
    for row, (decodes, prefills, num_sequences, prefill_tokens, free_blocks, num_cached, num_lower) in enumerate(
        states
    ):
        table.can_decode[row], table.can_prefill[row] = decodes, prefills
        table.num_sequences[row], table.prefill_tokens[row] = num_sequences, prefill_tokens
        table.free_blocks[row] = free_blocks
        cached[row], in_pool[row] = num_cached, max(0, num_cached - num_lower)
        workers.append(
            Plain(row, decodes, prefills, *states[row][2:5], int(cached[row]), int(in_pool[row]), int(ties[row]))
        )
    demand = Demand(key, num_prompt, 20, 16, avoid if avoid < len(states) else -1)
    policy = KvAwarePolicy(max_prefill_candidates=num_prefill)
    roles = table.can_decode, table.can_prefill, table.can_prefill
    candidates = Candidates(table, *roles, Prefixes(cached, in_pool))
    route = policy.route(demand, candidates)
    assert (None if route is None else (route.decode, route.prefill)) == plain_route(demand, workers, policy)


def test_equal_requests_agree_whatever_the_router_and_different_ones_spread() -> None:
    names = [f"decode-{index}" for index in range(8)]
    chosen = []
    for order in (names, names[::-1]):
        table = WorkerTable()
        for name in order:
            table.add(name)
        chosen.append([order[int(tie_break(key, table.seeds).argmin())] for key in range(400)])
    assert chosen[0] == chosen[1]
    assert all(20 < chosen[0].count(name) < 90 for name in names)
