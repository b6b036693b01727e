"""The policies over columns of numbers choose as the plain ones over one worker after another do; they are found by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_policies import Plain, PlainPolicy, Prices

from router.config import RouterConfig
from router.fleet.prefix_index import Prefixes
from router.fleet.worker_table import WorkerTable
from router.policies.catalogue import POLICIES, policy_named
from router.policies.policy import Candidates, Demand, tie_break
from workers.errors import InvalidConfig

few = st.integers(0, 3)
seconds = st.sampled_from((0.0, 1e-9, 3e-8, 1e-5, 2.5e-4, 4e-3))
worker_states = st.fixed_dictionaries(
    {
        "decodes": st.booleans(),
        "prefills": st.booleans(),
        "can_decode": st.booleans(),
        "computes": st.booleans(),
        "is_short": st.booleans(),
        "num_sequences": few,
        "prefill_tokens": st.integers(0, 200),
        "free_blocks": st.integers(-2, 12),
        "cached": st.integers(0, 4),
        "num_lower": few,
        "batch_tokens": st.sampled_from((0, 65, 256, 2048)),
        "last_decodes": few,
        "last_context": st.integers(0, 5000),
        "unit": st.tuples(seconds, seconds, seconds, seconds, seconds),
        "looked_back": st.sampled_from((0.0, 17.5, 4000.0)),
        "lent_s": st.sampled_from((0.0, 0.4, 3.0, 9.0)),
    }
)
demands = st.builds(
    Demand,
    key=st.integers(0, 2**64 - 1),
    num_prompt_tokens=st.integers(1, 300),
    num_output_tokens=st.sampled_from((1, 20, 256)),
    block_size=st.just(16),
    avoid=st.integers(-1, 8),
    ttft_s=st.sampled_from((0.0, 0.01, 1.0)),
    tpot_s=st.sampled_from((0.0, 0.004, 0.02)),
    session=st.sampled_from((0, 77, 2**63)),
)
prices = st.builds(Prices, seconds, seconds, st.integers(0, 9))


def set_up(states: list[dict[str, Any]], demand: Demand, charged: Prices) -> tuple[Demand, Candidates, list[Plain]]:
    """The same workers in both forms."""
    if demand.avoid >= len(states):
        demand = Demand(**{name: getattr(demand, name) for name in Demand.__slots__} | {"avoid": -1})
    table = WorkerTable()
    for index in range(len(states)):
        table.add(f"w-{index}")
    ties = tie_break(demand.tie_key, table.seeds)
    workers = []
    for row, state in enumerate(states):
        state = dict(state)
        in_pool = max(0, state["cached"] - state.pop("num_lower"))
        worker = Plain(row, in_pool=in_pool, tie=int(ties[row]), **state)
        for name in (
            "can_decode",
            "num_sequences",
            "prefill_tokens",
            "free_blocks",
            "batch_tokens",
            "looked_back",
            "lent_s",
        ):
            getattr(table, name)[row] = getattr(worker, name)
        table.steps[row] = (1, worker.last_decodes, worker.last_context, 0, 0, 0.01)
        table.seconds[row] = worker.unit
        workers.append(worker)

    def flags(name: str) -> Any:
        return np.array([getattr(worker, name) for worker in workers], np.bool_)

    def counts(name: str) -> Any:
        return np.array([getattr(worker, name) for worker in workers], np.int64)

    roles = flags("decodes"), flags("prefills"), flags("computes"), flags("is_short")
    prefixes = Prefixes(counts("cached"), counts("in_pool"))
    candidates = Candidates(
        table, *roles, prefixes, charged.handoff_s, charged.handoff_block_s, charged.lower_tier_tokens
    )
    return demand, candidates, workers


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=150, deadline=None)
@given(st.lists(worker_states, max_size=9), demands, prices, few)
def test_both_choose_alike(
    name: str, states: list[dict[str, Any]], demand: Demand, charged: Prices, num_prefill: int
) -> None:
    demand, candidates, workers = set_up(states, demand, charged)
    policy = policy_named(name, num_prefill, seed=5)
    route = policy.route(demand, candidates)
    plain = PlainPolicy(demand, workers, charged, num_prefill)
    answers = {"round_robin": lambda: plain.in_turn(0, 0), "random": lambda: plain.at_random(5)}
    expected = answers.get(name, lambda: plain.route(name))()
    assert (None if route is None else (route.decode, route.prefill)) == expected


def test_a_policy_that_nobody_knows_is_refused_with_the_one_that_is_meant() -> None:
    with pytest.raises(InvalidConfig, match=r"^router\.policy 'least_load' is not known; did you mean least_loaded\?$"):
        RouterConfig(model="unused", policy="least_load")
    with pytest.raises(InvalidConfig, match="known here: kv_aware, "):
        RouterConfig(model="unused", policy="???")


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
