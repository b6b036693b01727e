"""What goes to host memory, what to disk, what is forgotten: the bookkeeping of tiers, without a byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import InvariantViolated
from workers.kv_cache import prefix_cache as ledgers
from workers.kv_cache.block_hash import BlockKey, token_bytes
from workers.kv_cache.prefix_cache import MAX_PENDING_CHANGES, Ledger
from workers.kv_cache.tier_book import Delete, Keep, Spill, TierBook
from workers.status import KvEvent, Tier


def key(number: int) -> BlockKey:
    return BlockKey(number, number - 1, token_bytes([number]))


def demote_all(book: TierBook, *numbers: int) -> list[object]:
    """Evicts blocks from the pool one after the other; every write succeeds."""
    commands: list[object] = []
    for number in numbers:
        for command in book.demote(key(number), can_write=True):
            commands.append(command)
            if isinstance(command, Spill):
                book.written(command.key.block_hash)
    return commands


def places(book: TierBook, *numbers: int) -> list[Tier | None]:
    return [book.holds(key(number)) for number in numbers]


def test_blocks_sink_from_host_to_disk_and_out_in_the_order_of_their_use() -> None:
    book = TierBook(2, 2, Ledger())
    demote_all(book, 1, 2, 3, 4)
    assert places(book, 1, 2, 3, 4) == [Tier.DISK, Tier.DISK, Tier.HOST, Tier.HOST]
    assert demote_all(book, 5) == [Delete(1), Spill(key(3), 0), Keep(key(5), 0)]
    assert places(book, 1, 2, 3, 4, 5) == [None, Tier.DISK, Tier.DISK, Tier.HOST, Tier.HOST]


def test_without_a_host_tier_blocks_go_to_disk_straight_from_the_pool() -> None:
    book = TierBook(0, 2, Ledger())
    assert demote_all(book, 1) == [Spill(key(1), None)]
    assert demote_all(book, 1) == []


def test_a_block_that_was_promoted_goes_first_and_is_not_written_while_the_pool_has_it() -> None:
    book = TierBook(2, 8, Ledger())
    demote_all(book, 1, 2)
    book.promoted([key(2)])
    assert demote_all(book, 3) == [Keep(key(3), 1)]
    assert places(book, 1, 2, 3) == [Tier.HOST, None, Tier.HOST]
    assert demote_all(book, 2) == [Spill(key(1), 0), Keep(key(2), 0)]


def test_a_block_that_comes_down_again_is_not_copied_again() -> None:
    book = TierBook(2, 0, Ledger())
    demote_all(book, 1, 2)
    book.promoted([key(1)])
    assert demote_all(book, 1) == []
    demote_all(book, 3)
    assert places(book, 1, 2, 3) == [Tier.HOST, None, Tier.HOST]


def test_pinned_blocks_stay_and_the_newcomer_goes_elsewhere() -> None:
    book = TierBook(1, 1, Ledger())
    demote_all(book, 1)
    book.pin([key(1)])
    assert demote_all(book, 2) == [Spill(key(2), None)]
    book.pin([key(2)])
    assert demote_all(book, 3) == [] and book.counters["kv_disk_dropped_blocks"] == 1
    book.unpin([key(1), key(2)])
    assert demote_all(book, 3) == [Delete(2), Spill(key(1), 0), Keep(key(3), 0)]
    with pytest.raises(InvariantViolated):
        book.unpin([key(1)])


def test_a_busy_disk_costs_the_newcomer_and_nobody_else() -> None:
    book = TierBook(0, 1, Ledger())
    demote_all(book, 1)
    assert book.demote(key(2), can_write=False) == []
    assert places(book, 1, 2) == [Tier.DISK, None]


def test_a_hash_alone_is_not_believed() -> None:
    book = TierBook(2, 2, Ledger())
    demote_all(book, 1)
    assert (
        book.holds(BlockKey(1, 0, token_bytes([99]))) is None and book.holds(BlockKey(1, 7, token_bytes([1]))) is None
    )


def test_a_smaller_disk_than_before_keeps_what_was_used_last() -> None:
    book = TierBook(0, 2, Ledger())
    assert book.restore([1, 2, 3]) == [Delete(1)]
    assert places(book, 1, 2, 3) == [None, Tier.DISK, Tier.DISK]


def test_a_disk_that_was_given_up_is_forgotten_at_once() -> None:
    ledger = Ledger()
    book = TierBook(0, 4, ledger)
    demote_all(book, 1, 2)
    book.demote(key(3), can_write=True)
    assert ledger.dump().stored == (1, 2)
    book.close_disk()
    book.written(3)
    assert ledger.dump().stored == () and places(book, 1, 2, 3) == [None] * 3
    assert demote_all(book, 4) == []


moves = st.lists(
    st.tuples(st.sampled_from(["demote", "busy", "promote", "finish", "pin", "unpin", "spoil"]), st.integers(1, 9)),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(moves, st.integers(0, 3), st.integers(0, 3))
def test_no_order_of_events_breaks_a_bound_or_loses_track(
    story: list[tuple[str, int]], num_host: int, num_disk: int
) -> None:
    ledger = Ledger()
    book = TierBook(num_host, num_disk, ledger)
    slots: dict[int, int] = {}
    files: set[int] = set()
    writing: list[int] = []
    pins: list[int] = []
    believed: dict[int, Tier] = {}
    for action, number in story:
        pinned = {n: book.holds(key(n)) for n in pins}
        commands: list[object] = []
        if action in ("demote", "busy"):
            commands += book.demote(key(number), can_write=action == "demote")
        elif action == "promote":
            book.promoted([key(number)])
        elif action == "finish" and writing:
            book.written(writing.pop(0))
        elif action == "pin" and book.holds(key(number)) is not None:
            book.pin([key(number)])
            pins.append(number)
        elif action == "unpin" and pins:
            book.unpin([key(pins.pop())])
        elif action == "spoil" and number not in pins and (tier := book.holds(key(number))) is not None:
            commands += book.spoiled(key(number), tier)
        for command in commands:
            match command:
                case Keep(kept, slot):
                    assert 0 <= slot < num_host
                    slots[slot] = kept.block_hash
                case Spill(spilled, slot):
                    assert spilled.block_hash not in files
                    assert slot is None or slots[slot] == spilled.block_hash
                    files.add(spilled.block_hash)
                    writing.append(spilled.block_hash)
                case Delete(block_hash):
                    files.remove(block_hash)
        assert len(files) <= num_disk and book.num_disk_blocks == len(files)
        assert book.num_host_blocks <= num_host
        for n in range(1, 10):
            if book.holds(key(n)) is Tier.HOST:
                assert slots[book.slot_of(key(n))] == n
            if book.holds(key(n)) is Tier.DISK:
                assert n in files and n not in writing
            assert ledger.best(n) is book.holds(key(n))
        assert all(book.holds(key(n)) is not None for n, tier in pinned.items() if tier is not None and n in pins)
        apply(believed, ledger.take_event())
        truth = {n: ledger.best(n) for n in range(1, 10)}
        assert believed == {n: tier for n, tier in truth.items() if tier is not None}


def apply(believed: dict[int, Tier], event: KvEvent | None) -> None:
    """As a router takes an event over."""
    if event is None:
        return
    if event.reset:
        believed.clear()
    for block_hash in event.removed:
        del believed[block_hash]
    believed.update(zip(event.stored, event.tiers or [Tier.POOL] * len(event.stored), strict=True))


def test_what_comes_and_goes_between_two_frames_is_not_told() -> None:
    ledger = Ledger()
    ledger.add([1], Tier.POOL)
    ledger.add([1], Tier.HOST)
    ledger.add([2], Tier.POOL)
    assert ledger.take_event() == KvEvent(1, (1, 2))
    ledger.remove(1, Tier.POOL)
    ledger.remove(2, Tier.POOL)
    ledger.add([3], Tier.DISK)
    ledger.remove(3, Tier.DISK)
    assert ledger.take_event() == KvEvent(2, (1,), (2,), tiers=(Tier.HOST,))
    ledger.add([1], Tier.POOL)
    ledger.remove(1, Tier.POOL)
    assert ledger.take_event() is None
    assert ledger.dump() == KvEvent(3, (1,), reset=True, tiers=(Tier.HOST,))


def test_too_many_changes_become_a_dump() -> None:
    ledger = Ledger()
    for number in range(MAX_PENDING_CHANGES + 1):
        ledger.add([number], Tier.POOL)
    event = ledger.take_event()
    assert event is not None and event.reset and len(event.stored) == MAX_PENDING_CHANGES + 1
    assert ledger.take_event() is None


def test_a_dump_of_a_huge_tier_names_the_fastest_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_TOLD", 3)
    ledger = Ledger()
    for number in range(6):
        ledger.add([number], Tier.DISK)
    ledger.add([4], Tier.POOL)
    ledger.add([5], Tier.HOST)
    dump = ledger.dump()
    assert dump.stored[:2] == (4, 5) and dump.tiers == (Tier.POOL, Tier.HOST, Tier.DISK)
