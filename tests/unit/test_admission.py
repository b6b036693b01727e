"""A request that cannot be admitted yet costs nobody anything: no cached block, no copy, no second look at a prefix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from builders import make_request
from tier_rig import rig

from workers.errors import Refused
from workers.kv_cache.manager import KvCacheManager
from workers.kv_cache.pools import PooledKvCache
from workers.runner import BLOCK_SIZE
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.sequence import Kind, Sequence, State

Kv = KvCacheManager | PooledKvCache

CACHES: dict[str, Callable[[int], Kv]] = {
    "one pool": lambda num_blocks: KvCacheManager(num_blocks, BLOCK_SIZE),
    "two pools": lambda num_blocks: PooledKvCache(2, num_blocks, BLOCK_SIZE),
}


def sequence(number: int, num_blocks: float, kind: Kind = Kind.LOCAL) -> Sequence:
    """A prompt of so many blocks that shares none with other numbers."""
    prompt = range(10_000 * number, 10_000 * number + int(BLOCK_SIZE * num_blocks))
    return Sequence(number, make_request(prompt, 500), kind, number)


def run_prompt(scheduler: Scheduler, one: Sequence) -> None:
    scheduler.add(one)
    scheduler.schedule()
    scheduler.computed_prefill(one, one.num_prompt)


@pytest.fixture(params=list(CACHES))
def crowded(request: pytest.FixtureRequest) -> tuple[Scheduler, Kv]:
    """Pools of 20 blocks: in each 10 are cached, and a sequence that decodes holds 6."""
    kv = CACHES[request.param](20)
    scheduler = Scheduler(kv, Limits(64, 4096, 100, 0))
    num_pools = kv.num_blocks // 20
    cached = [sequence(1 + number, 10, Kind.SOURCE) for number in range(num_pools)]
    for one in cached:  # all at once, so that each lands in a pool of its own
        run_prompt(scheduler, one)
    decoding = [sequence(11 + number, 5.5) for number in range(num_pools)]
    for one in cached:
        scheduler.finish(one)
    for one in decoding:
        run_prompt(scheduler, one)
        scheduler.drew(one, 1)
    assert all(one.table.num_cached == 0 for one in decoding)
    kv.take_event()
    return scheduler, kv


def test_an_admission_that_fails_leaves_the_prefix_cache_as_it_was(crowded: tuple[Scheduler, Kv]) -> None:
    scheduler, kv = crowded
    big = sequence(90, 14)  # there are 14 blocks, but one is to be left for the sequence that decodes
    scheduler.add(big)
    before = kv.num_available
    for _ in range(3):
        scheduler.schedule()
        assert big.state is State.WAITING and kv.num_available == before and kv.take_event() is None


def test_a_migrant_that_finds_no_room_leaves_the_prefix_cache_as_it_was(crowded: tuple[Scheduler, Kv]) -> None:
    scheduler, kv = crowded
    migrant = sequence(90, 12, Kind.MIGRANT)  # its prompt fits, what it may grow by meanwhile does not
    with pytest.raises(Refused):
        scheduler.admit_migrant(migrant, 16 * BLOCK_SIZE)
    assert kv.take_event() is None
    scheduler.admit_migrant(migrant, 13 * BLOCK_SIZE)
    assert len(migrant.table.blocks) == 13


def test_an_admission_that_fails_copies_nothing_down_and_holds_nothing_in_lower_tiers() -> None:
    with rig(num_host=32) as r:
        prompt = make_request(range(10, 10 + 3 * BLOCK_SIZE + 5), 2)
        r.ask(prompt)
        r.push_out()  # the prompt's blocks are in host memory now, the pool is full of others
        r.engine.add(1000, make_request([9] * 70, 20))
        for _ in range(2):
            r.engine.step()
        stored, pins = r.count("kv_host_stored_blocks"), dict(r.tiers._book._pins)
        r.engine.add(1001, prompt)  # all four blocks that are left, of which one is to be spared
        for _ in range(3):
            r.engine.step()
        assert r.engine.load().num_waiting == 1
        assert r.count("kv_host_stored_blocks") == stored and r.tiers._book._pins == pins


def test_what_could_not_be_computed_in_this_step_takes_no_blocks_yet_but_a_transfer_may_begin() -> None:
    scheduler = Scheduler(KvCacheManager(40, BLOCK_SIZE), Limits(64, 4 * BLOCK_SIZE, 100, 0))
    first, second, remote = sequence(1, 8), sequence(2, 4), sequence(3, 4, Kind.TARGET)
    for one in (first, second):
        scheduler.add(one)
        scheduler.schedule()
    assert (first.state, second.state) == (State.PREFILLING, State.WAITING) and not second.table.blocks
    scheduler.finish(second)
    scheduler.add(remote)
    assert scheduler.schedule().transfers == (remote,)


def test_a_prompt_that_waits_is_compared_with_the_cache_again_only_when_the_cache_has_changed(
    crowded: tuple[Scheduler, Kv],
) -> None:
    scheduler, kv = crowded
    waiting = sequence(1, 17)  # its first ten blocks are cached
    scheduler.add(waiting)
    before = kv.num_compared
    scheduler.schedule()
    assert waiting.state is State.WAITING and kv.num_compared - before == 10
    for _ in range(5):
        scheduler.schedule()
    assert kv.num_compared - before == 10
    scheduler.finish(next(s for s in scheduler.active if s.state is State.DECODING))
    scheduler.schedule()
    assert waiting.table.num_cached == 10


def test_what_is_found_of_a_prompt_follows_what_comes_into_a_cache_and_what_goes() -> None:
    kv = KvCacheManager(8, BLOCK_SIZE)
    prompt = kv.prompt_blocks(range(4 * BLOCK_SIZE + 1))
    assert kv.match(prompt) == ()
    first = kv.reserve_prompt(kv.prompt_blocks(range(2 * BLOCK_SIZE)))
    kv.publish_prompt(first, 2 * BLOCK_SIZE)
    assert kv.match(prompt) == tuple(first.blocks)
    longer = kv.reserve_prompt(kv.prompt_blocks(range(3 * BLOCK_SIZE)))
    kv.publish_prompt(longer, 3 * BLOCK_SIZE)
    found = kv.match(prompt)
    assert found == tuple(longer.blocks)
    kv.release(longer)
    kv.release(first)
    kv.reserve_prompt(kv.prompt_blocks(range(10_000, 10_000 + 6 * BLOCK_SIZE)))  # evicts the last one
    assert kv.match(prompt) == found[:2]


def test_a_key_keeps_its_tokens_in_four_bytes_each_and_a_row_keeps_its_blocks_in_place() -> None:
    kv = KvCacheManager(300, BLOCK_SIZE)
    prompt = kv.prompt_blocks(range(1000, 1000 + 3 * BLOCK_SIZE))
    assert len(prompt.key(1).tokens) == 4 * BLOCK_SIZE
    assert prompt.key(1).token_ids == tuple(range(1000 + BLOCK_SIZE, 1000 + 2 * BLOCK_SIZE))
    table = kv.reserve_prompt(prompt)
    kv.grow(table, 100 * BLOCK_SIZE)
    row, copies = table.row, 0
    for num_blocks in range(101, 300):
        kv.grow(table, num_blocks * BLOCK_SIZE)
        copies += table.row.base is not row.base
        row = table.row
        assert row.dtype == np.int32 and row.tolist() == table.blocks
    assert copies <= 2
    kv.shrink(table, 150 * BLOCK_SIZE)
    assert table.row.tolist() == table.blocks and len(table.row) == 150
