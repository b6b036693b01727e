"""The prefix index stays within its bound, and keeps what is useful."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix_index import PrefixIndex
from workers.status import KvEvent, Tier


def filled(max_blocks: int, **workers: range) -> PrefixIndex:
    index = PrefixIndex(max_blocks)
    for worker_id, blocks in workers.items():
        index.attach(worker_id)
        index.apply(worker_id, KvEvent(1, tuple(blocks), reset=True))
    return index


def test_only_an_unbroken_prefix_counts() -> None:
    index = filled(100, a=range(1, 4))
    assert index.match("a", [1, 2, 3, 4]) == 3
    assert index.match("a", [1, 9, 3]) == 1
    assert index.match("a", [9, 1]) == 0
    assert index.match("unknown", [1]) == 0


def test_a_worker_that_is_lost_leaves_nothing() -> None:
    index = filled(100, a=range(5), b=range(7))
    index.drop("a")
    assert (len(index), index.match("a", [0]), index.match("b", [0])) == (7, 0, 1)
    assert not index.apply("a", KvEvent(2, (1,)))


def test_beyond_its_bound_the_index_forgets_tails_before_heads() -> None:
    index = filled(10, a=range(12))
    assert len(index) == 10 and index.match("a", list(range(12))) == 10


def test_a_block_in_a_lower_tier_counts_but_not_as_in_the_pool() -> None:
    index = filled(100, a=range(1, 5))
    index.apply("a", KvEvent(2, (2, 3), tiers=(Tier.DISK, Tier.HOST)))
    assert (index.match("a", [1, 2, 3, 4]), index.match_pool("a", [1, 2, 3, 4])) == (4, 1)
    index.touch("a", [1, 2, 3])
    assert index.match_pool("a", [1, 2]) == 1
    index.apply("a", KvEvent(3, (2, 3)))
    assert index.match_pool("a", [1, 2, 3, 4]) == 4 == len(index)
    index.apply("a", KvEvent(4, (1, 2), reset=True, tiers=(Tier.HOST, Tier.POOL)))
    assert (index.match("a", [1, 2, 3]), index.match_pool("a", [1, 2, 3])) == (2, 0)


def test_what_requests_use_is_kept_longest() -> None:
    index = filled(10, a=range(8))
    index.touch("a", [6, 7])
    index.apply("a", KvEvent(2, tuple(range(100, 108))))
    assert index.match("a", list(range(100, 108))) == 8
    assert index.match("a", [6, 7]) == 2 and index.match("a", [0]) == 0


def test_a_small_table_is_not_evicted_for_a_large_one() -> None:
    index = filled(20, small=range(4), large=range(100, 150))
    assert index.match("small", list(range(4))) == 4 and len(index) == 20


events = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.integers(1, 6),
        st.lists(st.integers(0, 30), max_size=8),
        st.lists(st.integers(0, 30), max_size=3),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(events)
def test_no_order_of_events_breaks_the_bound_or_the_count(
    story: list[tuple[str, int, list[int], list[int], bool]],
) -> None:
    index = PrefixIndex(12)
    index.attach("a")
    index.attach("b")
    for worker_id, sequence, stored, removed, reset in story:
        index.apply(worker_id, KvEvent(sequence, tuple(stored), tuple(removed), reset))
        held = sum(index.match(worker, [block]) for worker in "ab" for block in range(31))
        assert held == len(index) <= 12
