"""A request that cannot be admitted yet costs nobody anything: no cached block, no copy, no blocks before it can use them."""

from __future__ import annotations

from collections.abc import Callable

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
