"""Sequences keep to one KV pool of several, a lost pool costs only its own sequences, and no token changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import fake_layout, generate_alone, make_engine, make_request, run_to_end, step_until, tokens_of
from workers.engine.fake_runner import FakeRunner
from workers.errors import PoolsLost
from workers.group.step_codec import split_by_pool
from workers.kv_cache.block_pool import OutOfBlocks
from workers.kv_cache.pools import PooledKvCache
from workers.kv_memory.memory import KvMemory
from workers.request import FinishReason, HandoffReport
from workers.runner import Batch, Sampled
from workers.scheduler.sequence import Kind


class PooledFakeRunner:
    """Several FakeRunners, each with a pool of its own; loses pools on demand, before a step."""

    def __init__(self, num_pools: int, num_blocks: int) -> None:
        self._parts = [FakeRunner(KvMemory(fake_layout(num_blocks))) for _ in range(num_pools)]
        self.num_pools = num_pools
        self.vocab_size = self._parts[0].vocab_size
        self.kv_memory = KvMemory(fake_layout(num_pools * num_blocks))
        self.tokens_of_pool = [0] * num_pools
        self.lose: Callable[[], tuple[int, ...] | None] = lambda: None

    def execute(self, batch: Batch) -> list[Sampled]:
        parts = split_by_pool(batch, self.num_pools, self._parts[0].kv_memory.layout.num_blocks)
        lost = self.lose()
        if lost is not None:
            for pool in lost:
                self._parts[pool].kv_memory.bytes[:] = 0xEE
            raise PoolsLost(lost, "told to")
        found = {}
        for pool, part in enumerate(parts):
            self.tokens_of_pool[pool] += part.num_tokens
            found |= {result.sequence_id: result for result in self._parts[pool].execute(part)}
        return [found[piece.sequence_id] for piece in (*batch.prefill, *batch.decode)]


REQUESTS = [make_request(range(10 + i, 60 + 37 * i), 30, request_id=str(i)) for i in range(6)]
GOLDEN = [generate_alone(request, num_blocks=16) for request in REQUESTS]


def test_sequences_spread_over_pools_and_draw_the_tokens_they_draw_alone() -> None:
    runner = PooledFakeRunner(3, 16)
    engine = make_engine(runner)
    for i, request in enumerate(REQUESTS):
        engine.add(i, request)
    outputs = run_to_end(engine)
    assert [tokens_of(outputs, i) for i in range(6)] == GOLDEN
    assert all(runner.tokens_of_pool) and engine.num_held_blocks == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.sets(st.integers(0, 1))), min_size=1, max_size=4))
def test_lost_pools_change_no_token(losses: list[tuple[int, set[int]]]) -> None:
    runner = PooledFakeRunner(2, 12)
    engine = make_engine(runner)
    plan = iter([entry for gap, pools in losses for entry in [None] * gap + [tuple(sorted(pools))]])
    runner.lose = lambda: next(plan, None)
    for i, request in enumerate(REQUESTS):
        engine.add(i, request)
    outputs = run_to_end(engine)
    assert [tokens_of(outputs, i) for i in range(6)] == GOLDEN
    assert engine.num_held_blocks == 0


def test_pools_too_small_for_all_preempt_within_a_pool_and_change_no_token() -> None:
    requests = [make_request(range(i, i + 60), 150, request_id=str(i)) for i in range(6)]
    golden = [generate_alone(request) for request in requests]
    engine = make_engine(PooledFakeRunner(2, 5), prefix_cache=False)
    for i, request in enumerate(requests):
        engine.add(i, request)
    outputs = run_to_end(engine)
    assert [tokens_of(outputs, i) for i in range(6)] == golden
    assert dict(engine.counters())["preemptions"] > 0


def test_a_prompt_longer_than_one_pool_is_refused_though_all_pools_could_hold_it() -> None:
    engine = make_engine(PooledFakeRunner(4, 3))
    with pytest.raises(Exception, match="the pool has 3"):
        engine.add(0, make_request(range(250), 8))


def test_a_prompt_held_for_another_worker_fails_when_its_pool_is_lost() -> None:
    runner = PooledFakeRunner(2, 8)
    engine = make_engine(runner)
    engine.add(0, make_request(range(100), 4), Kind.SOURCE)
    step_until(engine, "prefilled")
    engine.add(1, make_request(range(30), 4))
    losses = iter([(0,)])
    runner.lose = lambda: next(losses, None)
    outputs = run_to_end(engine)
    ((_, failed),) = [entry for entry in outputs if entry[0] == 0]
    assert failed.finish_reason is FinishReason.ERROR
    assert len(tokens_of(outputs, 1)) == 4 and engine.num_held_blocks == 0


def test_blocks_that_were_lost_while_they_were_filled_are_computed_here() -> None:
    runner = PooledFakeRunner(2, 8)
    engine = make_engine(runner)
    request = make_request(range(100), 6)
    engine.add(0, request, Kind.TARGET)
    (wanted,) = step_until(engine, "transfers").transfers
    engine.add(1, make_request(range(30), 4))
    losses = iter([(0, 1)])
    runner.lose = lambda: next(losses, None)
    outputs = run_to_end(engine)
    engine.incoming.landed(wanted.sequence_id, Sampled(0, 999), 0, HandoffReport("a", "b", "shm"))
    outputs += run_to_end(engine)
    assert tokens_of(outputs, 0) == generate_alone(request)


def test_routers_see_a_hash_as_long_as_any_pool_has_it() -> None:
    cache = PooledKvCache(2, 4, 4)
    tokens = tuple(range(9))
    prompt = cache.prompt_blocks(tokens)
    first = cache.reserve_prompt(prompt)
    second = cache.reserve_prompt(cache.prompt_blocks(tokens))
    assert {cache.pool_of(first), cache.pool_of(second)} == {0, 1}
    for table in (first, second):
        cache.publish_prompt(table, 9)
    event = cache.take_event()
    assert event is not None and set(event.stored) == set(prompt.hashes) and not event.removed
    cache.forget_pool(cache.pool_of(first))
    assert cache.take_event() is None
    cache.forget_pool(cache.pool_of(second))
    event = cache.take_event()
    assert event is not None and set(event.removed) == set(prompt.hashes) and event.sequence == 2
    assert cache.dump().stored == ()


def test_a_prompt_goes_where_its_beginning_is_and_elsewhere_when_that_pool_is_full() -> None:
    cache = PooledKvCache(2, 4, 4)
    tokens = tuple(range(13))
    prompt = cache.prompt_blocks(tokens)
    table = cache.reserve_prompt(prompt)
    home = cache.pool_of(table)
    cache.publish_prompt(table, 13)
    cache.release(table)
    again = cache.reserve_prompt(cache.prompt_blocks(tokens))
    assert cache.pool_of(again) == home and again.num_cached == 3
    other = cache.reserve_prompt(cache.prompt_blocks(tuple(range(50, 66)), False))
    assert cache.pool_of(other) == 1 - home
    with pytest.raises(OutOfBlocks):
        cache.reserve_prompt(cache.prompt_blocks(tuple(range(80, 90)), False))
    assert np.array_equal(sorted(table.blocks), [])
