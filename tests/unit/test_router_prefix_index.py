"""The prefix index stays within its bound, keeps what is useful, and looks at no more than it must."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet import prefix_index
from router.fleet.prefix_index import SHARD_BLOCKS, STEP_BLOCKS, PrefixIndex
from workers.status import KvEvent, Tier


def filled(max_blocks: int, *workers: Iterable[int]) -> PrefixIndex:
    """Worker i has told the i-th of these."""
    index = PrefixIndex(max_blocks)
    for worker, blocks in enumerate(workers):
        index.attach(worker)
        index.apply(worker, KvEvent(1, tuple(blocks), reset=True))
    take_all_in(index)
    return index


def take_all_in(index: PrefixIndex) -> None:
    while index.backlog:
        index.take_in()


def match(index: PrefixIndex, worker: int, hashes: Iterable[int]) -> int:
    return int(index.match(list(hashes), 8).cached[worker])


def match_pool(index: PrefixIndex, worker: int, hashes: Iterable[int]) -> int:
    return int(index.match(list(hashes), 8).in_pool[worker])


def test_only_an_unbroken_prefix_counts() -> None:
    index = filled(100, range(1, 4))
    assert match(index, 0, [1, 2, 3, 4]) == 3
    assert match(index, 0, [1, 9, 3]) == 1
    assert match(index, 0, [9, 1]) == 0
    assert match(index, 0, []) == 0
    assert match(index, 5, [1]) == 0


def test_a_worker_that_is_lost_leaves_nothing() -> None:
    index = filled(100, range(5), range(7))
    index.drop(0)
    assert (match(index, 0, [0]), match(index, 1, [0])) == (0, 1)
    assert not index.apply(0, KvEvent(2, (1,)))
    index.attach(0)
    assert match(index, 0, [0]) == 0, "what it told before it was lost does not count for its next start"


def test_beyond_its_bound_the_index_forgets_tails_before_heads() -> None:
    index = filled(10, range(12))
    assert len(index) == 10 and match(index, 0, range(12)) == 10
    index.apply(0, KvEvent(2, (100, 101)))
    assert (match(index, 0, range(12)), match(index, 0, [100, 101])) == (8, 2)


def test_a_block_in_a_lower_tier_counts_but_not_as_in_the_pool() -> None:
    index = filled(100, range(1, 5))
    index.apply(0, KvEvent(2, (2, 3), tiers=(Tier.DISK, Tier.HOST)))
    assert (match(index, 0, [1, 2, 3, 4]), match_pool(index, 0, [1, 2, 3, 4])) == (4, 1)
    index.touch([1, 2, 3])
    assert match_pool(index, 0, [1, 2]) == 1
    index.apply(0, KvEvent(3, (2, 3)))
    assert match_pool(index, 0, [1, 2, 3, 4]) == 4 == len(index)
    index.apply(0, KvEvent(4, (1, 2), reset=True, tiers=(Tier.HOST, Tier.POOL)))
    assert (match(index, 0, [1, 2, 3]), match_pool(index, 0, [1, 2, 3])) == (2, 0)


def test_the_tiers_of_workers_that_share_blocks_stay_apart() -> None:
    index = filled(100, range(4), range(4))
    index.apply(0, KvEvent(2, (1,), tiers=(Tier.DISK,)))
    assert [match_pool(index, worker, range(4)) for worker in (0, 1)] == [1, 4]
    index.apply(0, KvEvent(3, removed=(1,)))
    assert [match(index, worker, range(4)) for worker in (0, 1)] == [1, 4]


def test_what_requests_use_is_kept_longest() -> None:
    index = filled(10, range(8))
    index.touch([6, 7])
    index.apply(0, KvEvent(2, tuple(range(100, 108))))
    assert match(index, 0, range(100, 108)) == 8
    assert match(index, 0, [6, 7]) == 2 and match(index, 0, [0]) == 0


def test_a_dump_takes_no_more_than_its_workers_share_from_the_others() -> None:
    index = filled(20, range(10), range(100, 150))
    assert match(index, 0, range(10)) == 10 and match(index, 1, range(100, 150)) == 10 and len(index) == 20


def test_an_event_at_the_bound_copies_and_visits_a_part_of_one_shard() -> None:
    """However large the index is: it once copied the largest table for every event."""
    most = 0
    for max_blocks in (2 * SHARD_BLOCKS, 16 * SHARD_BLOCKS):
        index = filled(max_blocks, range(max_blocks))
        for number in range(50):
            before = index.num_visited
            index.apply(0, KvEvent(2 + number, (max_blocks + number,)))
            most = max(most, index.num_visited - before)
        assert index.num_evicted > 0 and len(index) <= max_blocks
    assert most <= SHARD_BLOCKS // 4


def test_one_walk_finds_what_every_worker_has() -> None:
    prompt = list(range(200))
    for num_workers in (2, 700):
        index = filled(10_000, *(prompt[: 1 + worker % 200] for worker in range(num_workers)))
        before = index.num_visited
        found = index.match(prompt, num_workers)
        assert list(found.cached) == [1 + worker % 200 for worker in range(num_workers)]
        assert index.num_visited - before <= len(prompt)


def test_a_long_dump_is_taken_in_step_by_step_and_for_nobody_once_its_worker_is_gone() -> None:
    index = PrefixIndex(100_000)
    index.attach(0)
    index.apply(0, KvEvent(1, tuple(range(5 * STEP_BLOCKS)), reset=True))
    assert len(index) == index.num_visited == STEP_BLOCKS
    index.apply(0, KvEvent(2, (10**6,)))
    assert match(index, 0, [10**6]) == 0, "what was told later counts later"
    take_all_in(index)
    assert match(index, 0, range(5 * STEP_BLOCKS)) == 5 * STEP_BLOCKS and match(index, 0, [10**6]) == 1
    index.apply(0, KvEvent(9, tuple(range(5 * STEP_BLOCKS)), reset=True))
    index.drop(0)
    index.attach(1)
    take_all_in(index)
    assert match(index, 1, [0]) == 0 and index.backlog == 0


def test_more_than_can_wait_counts_as_missed() -> None:
    index = PrefixIndex(STEP_BLOCKS)
    index.attach(0)
    gaps = [index.apply(0, KvEvent(1 + number, tuple(range(3 * STEP_BLOCKS)))) for number in range(3)]
    assert gaps == [False, True, False], "a dump is asked for once"
    assert index.backlog <= 3 * STEP_BLOCKS
    index.apply(0, KvEvent(9, (7,), reset=True))
    take_all_in(index)
    assert match(index, 0, [7]) == 1 and match(index, 0, [6, 7]) == 0


def test_bits_of_lost_workers_are_used_again() -> None:
    index = filled(4 * SHARD_BLOCKS, range(3000))
    for number in range(200):
        index.drop(0)
        index.attach(0)
        index.apply(0, KvEvent(1, (number, 10_000 + number), reset=True))
        assert match(index, 0, [number, 10_000 + number]) == 2 and match(index, 0, [(number + 1) % 200]) == 0
    assert index.num_slots < 20


def test_a_block_takes_no_more_memory_than_is_said() -> None:
    num_blocks = 3 * SHARD_BLOCKS
    events = [KvEvent(1 + number, tuple(range(number << 40, (number << 40) + 1024))) for number in range(12)]
    index = PrefixIndex(num_blocks)
    index.attach(0)
    tracemalloc.start()
    for event in events:
        index.apply(0, event)
        take_all_in(index)
        index.touch(event.stored)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said_bytes, set_bytes = 180, 28
    int_bytes = 36  # the numbers themselves were made before
    assert len(index) > num_blocks // 2 and used / len(index) + int_bytes <= said_bytes + set_bytes


events = st.lists(
    st.tuples(
        st.sampled_from((0, 1)),
        st.integers(1, 6),
        st.lists(st.integers(0, 30), max_size=8),
        st.lists(st.integers(0, 30), max_size=3),
        st.booleans(),
        st.sampled_from(("", "drop", "attach")),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(events, st.booleans())
def test_no_order_of_events_breaks_the_bound_or_makes_up_a_block(
    story: list[tuple[int, int, list[int], list[int], bool, str]], is_slow: bool
) -> None:
    """Against one set a worker: with room for all blocks the index knows exactly those; and never another one."""
    with_room, small = PrefixIndex(64), PrefixIndex(12)
    step, prefix_index.STEP_BLOCKS = prefix_index.STEP_BLOCKS, 3 if is_slow else STEP_BLOCKS
    try:
        known: dict[int, set[int]] = {}
        last: dict[int, int] = {}
        for worker, sequence, stored, removed, reset, life in story:
            for index in (with_room, small):
                if life == "drop":
                    index.drop(worker)
                if life == "attach" or worker not in known:
                    index.attach(worker)
            if life == "drop":
                known.pop(worker, None)
                last.pop(worker, None)
                continue
            if life == "attach" or worker not in known:
                known[worker], last[worker] = set(), 0
            event = KvEvent(sequence, tuple(stored), tuple(block for block in removed if block not in stored), reset)
            for index in (with_room, small):
                index.apply(worker, event)
            if reset:
                known[worker], last[worker] = set(stored), sequence
            elif last[worker] >= 0 and sequence > last[worker]:
                is_next = sequence == last[worker] + 1
                known[worker] = (known[worker] - set(event.removed)) | set(stored) if is_next else known[worker]
                last[worker] = sequence if is_next else -1
            assert len(small) <= 12
        take_all_in(with_room)
        take_all_in(small)
        for worker in (0, 1):
            held = {block for block in range(31) if match(with_room, worker, [block])}
            assert held == known.get(worker, set())
            assert {block for block in range(31) if match(small, worker, [block])} <= held
    finally:
        prefix_index.STEP_BLOCKS = step
