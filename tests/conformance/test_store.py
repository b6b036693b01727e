"""What every Store promises, run against the one in memory, the one in an actor and a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis_server import RedisServer

from cluster.membership.registration import number_start
from cluster.store.memory import MAX_CHANGES, MemoryStore
from cluster.store.redis_store import RedisStore
from cluster.store.signed import SignedStore
from cluster.store.store import ABSENT, MAX_VALUE_BYTES, Changes, Entry, Mirror, Snapshot, Store, StoreUnavailable
from router.tenants.buckets import Draw, Hold

BOUND_S = 60.0
SHORT_S, KEPT_S = 0.2, 4.0
"""Leases that end while a test waits; nothing depends on a step that comes before the end of a short one, and a lease that is
renewed or replaced lasts long enough for that on a busy machine."""


SECRET = "a secret of sixteen characters and more"


@pytest.fixture(params=["memory", "redis", "signed"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    store: Store
    if request.param == "memory":
        store = MemoryStore()
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        store = RedisStore(server.url, cluster=uuid.uuid4().hex)
        store = SignedStore(store, SECRET) if request.param == "signed" else store
    yield store
    await store.close()


async def test_a_value_reads_back_until_it_is_deleted(store: Store) -> None:
    version = await store.put("workers/a", "one")
    entry = await store.get("workers/a")
    assert entry is not None and (entry.key, entry.value, entry.version) == ("workers/a", "one", version)
    assert await store.delete("workers/a")
    assert await store.get("workers/a") is None
    assert not await store.delete("workers/a")


async def test_text_of_any_script_survives(store: Store) -> None:
    await store.put("keys/Клавиша 🔑", '{"名": "文心"}\n')
    entry = await store.get("keys/Клавиша 🔑")
    assert entry is not None and entry.value == '{"名": "文心"}\n'


async def test_versions_rise_with_every_write_and_survive_a_delete(store: Store) -> None:
    first = await store.put("a", "1")
    second = await store.put("a", "1")
    await store.delete("a")
    third = await store.put("a", "1")
    assert ABSENT < first < second < third


async def test_compare_and_set_lets_one_of_many_writers_win(store: Store) -> None:
    attempts = await asyncio.gather(*(store.compare_and_set("owner", ABSENT, str(n)) for n in range(10)))
    (winner,) = [n for n, version in enumerate(attempts) if version is not None]
    entry = await store.get("owner")
    assert entry is not None and entry.value == str(winner)
    assert await store.compare_and_set("owner", entry.version + 1000, "late") is None
    assert await store.compare_and_set("owner", entry.version, "next") is not None
    assert await store.compare_and_set("owner", entry.version, "stale") is None


async def test_a_delete_that_names_a_version_spares_a_newer_one(store: Store) -> None:
    old = await store.put("lease", "old")
    await store.put("lease", "new")
    assert not await store.delete("lease", old)
    entry = await store.get("lease")
    assert entry is not None and entry.value == "new"


async def test_no_number_of_a_start_is_given_twice(store: Store) -> None:
    numbers = await asyncio.gather(*(number_start(store, "decode-0", 1000.5) for _ in range(20)))
    assert sorted(numbers) == list(range(1000, 1020)), "as many in one second as there may be"
    assert await number_start(store, "decode-0", 5000.0) == 5000
    assert await number_start(store, "decode-0", 4000.0) == 5001, "though the clock was set back"
    assert await number_start(store, "decode-1", 4000.0) == 4000


async def test_list_shows_what_is_under_a_prefix_in_order(store: Store) -> None:
    for key in ("workers/b", "workers/a", "workersmith", "routers/a", "worker"):
        await store.put(key, key.upper())
    snapshot = await store.list("workers/")
    assert [(entry.key, entry.value) for entry in snapshot.entries] == [
        ("workers/a", "WORKERS/A"),
        ("workers/b", "WORKERS/B"),
    ]
    assert len((await store.list("")).entries) == 5
    assert (await store.list("nothing/")).entries == ()


async def test_a_lease_ends_and_a_renewed_one_does_not(store: Store) -> None:
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("workers/")) as snapshots:
        kept = await store.put("workers/kept", "x", ttl_s=KEPT_S)
        await store.put("workers/gone", "x", ttl_s=SHORT_S)
        assert await store.renew("workers/kept", kept, ttl_s=60.0)
        await until_only(snapshots, "workers/kept")
        assert await store.get("workers/gone") is None
        await store.put("workers/late", "x", ttl_s=KEPT_S)  # later than the end of the lease that was renewed
        await until_only(snapshots, "workers/kept")
    assert await store.get("workers/kept") is not None


async def test_a_plain_put_takes_the_time_limit_off(store: Store) -> None:
    await store.put("workers/a", "x", ttl_s=KEPT_S)
    await store.put("workers/a", "y")
    await store.put("workers/b", "x", ttl_s=KEPT_S)  # ends later than the first lease would have
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("workers/")) as snapshots:
        await until_only(snapshots, "workers/a")
    entry = await store.get("workers/a")
    assert entry is not None and entry.value == "y"


async def until_only(snapshots: AsyncIterator[Snapshot], key: str) -> None:
    """Returns with the first snapshot that shows this entry alone."""
    async for snapshot in snapshots:
        if [entry.key for entry in snapshot.entries] == [key]:
            return
    raise AssertionError("the watch has ended")


async def test_only_the_holder_renews_a_lease(store: Store) -> None:
    old = await store.put("workers/a", "generation 1", ttl_s=30.0)
    new = await store.put("workers/a", "generation 2", ttl_s=30.0)
    assert not await store.renew("workers/a", old, ttl_s=30.0)
    assert await store.renew("workers/a", new, ttl_s=30.0)
    assert not await store.renew("workers/b", ABSENT, ttl_s=30.0)


async def test_a_watch_shows_the_present_then_each_change_under_its_prefix(store: Store) -> None:
    await store.put("roles/a", "decode")
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("roles/")) as snapshots:
        seen = [await anext(snapshots)]
        for change in (
            store.put("roles/b", "prefill"),
            store.put("roles/a", "mixed"),
            store.delete("roles/b"),
        ):
            upcoming = asyncio.ensure_future(anext(snapshots))
            await store.put("elsewhere/a", "ignored")
            await change
            seen.append(await upcoming)
    assert [{entry.key[-1]: entry.value for entry in snapshot.entries} for snapshot in seen] == [
        {"a": "decode"},
        {"a": "decode", "b": "prefill"},
        {"a": "mixed", "b": "prefill"},
        {"a": "mixed"},
    ]
    assert len({snapshot.epoch for snapshot in seen}) == 1


async def test_two_watchers_see_the_same_change(store: Store) -> None:
    async with asyncio.timeout(BOUND_S):
        async with contextlib.aclosing(store.watch("a/")) as first, contextlib.aclosing(store.watch("a/")) as second:
            await asyncio.gather(anext(first), anext(second))
            upcoming = asyncio.gather(anext(first), anext(second))
            await store.put("a/1", "x")
            left, right = await upcoming
    assert left == right and left.entries[0].value == "x"


async def test_a_burst_of_changes_comes_as_few_states_and_the_last_one_is_right(store: Store) -> None:
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("workers/")) as snapshots:
        await anext(snapshots)
        num_states = 0
        for number in range(300):  # more than a watcher looks at by name
            await store.put(f"workers/{number:03}", "x")
        await store.put("workers/000", "last")
        await store.delete("workers/001")
        async for snapshot in snapshots:
            num_states += 1
            values = {entry.key: entry.value for entry in snapshot.entries}
            if len(values) == 299 and values["workers/000"] == "last":
                break
        assert "workers/001" not in values and num_states < 100


async def test_leases_that_end_at_different_times_are_all_noticed(store: Store) -> None:
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("workers/")) as snapshots:
        for number in range(5):
            await store.put(f"workers/{number}", "x", ttl_s=0.1 + 0.2 * number)
        kept = await store.put("workers/kept", "x", ttl_s=KEPT_S)
        assert await store.renew("workers/kept", kept, ttl_s=60.0)
        await until_only(snapshots, "workers/kept")


@pytest.mark.parametrize("num_entries", [20, 200])
async def test_what_a_watcher_of_redis_reads_for_a_change_does_not_grow_with_the_entries(
    redis_server: RedisServer, num_entries: int
) -> None:
    store = RedisStore(redis_server.url, cluster=uuid.uuid4().hex)
    for number in range(num_entries):
        await store.put(f"workers/{number}", "x" * 150)
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("workers/")) as snapshots:
        await anext(snapshots)
        before = (await store._client.info("stats"))["total_net_output_bytes"]
        await store.put("workers/0", "changed")
        await anext(snapshots)
        read = (await store._client.info("stats"))["total_net_output_bytes"] - before
    assert read < 10_000, "INFO itself takes some 6 kB; 200 entries take 30"
    await store.close()


async def test_a_redis_that_was_emptied_while_connected_is_a_new_life(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, cluster=uuid.uuid4().hex)
    await store.put("workers/a", "x")
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("workers/")) as snapshots:
        before = await anext(snapshots)
        await store._client.flushall()
        await store.put("workers/b", "x")
        after = await anext(snapshots)
    assert before.epoch != after.epoch and [entry.key for entry in after.entries] == ["workers/b"]
    await store.close()


def test_a_mirror_shows_whether_anything_became_different() -> None:
    a, b = Entry("a", "1", 1), Entry("b", "1", 2)
    mirror = Mirror()
    assert mirror.apply(Changes("life", 2, (a, b), is_whole=True)) and mirror.snapshot == Snapshot("life", (a, b))
    assert not mirror.apply(Changes("life", 3, (b,)))
    assert mirror.apply(Changes("life", 4, (Entry("c", "1", 4),), ("a",)))
    assert mirror.snapshot == Snapshot("life", (b, Entry("c", "1", 4)))
    assert not mirror.apply(Changes("life", 5, (), ("a",)))
    assert mirror.apply(Changes("next", 0, (b, Entry("c", "1", 4)), is_whole=True)), "another life is a change"


async def test_a_watcher_that_is_far_behind_gets_everything() -> None:
    store = MemoryStore()
    await store.put("a", "1")
    first = await store.next_changes("", "", 0)
    assert first.is_whole
    await store.put("a", "2")
    near = await store.next_changes("", first.epoch, first.revision)
    assert not near.is_whole and [entry.value for entry in near.entries] == ["2"]
    for _ in range(MAX_CHANGES + 1):
        await store.put("b", "1")
    far = await store.next_changes("", first.epoch, first.revision)
    assert far.is_whole and len(far.entries) == 2
    await store.close()


async def test_oversized_and_nameless_entries_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="exceeds"):
        await store.put("a", "x" * (MAX_VALUE_BYTES + 1))
    with pytest.raises(ValueError, match="store key"):
        await store.put("", "x")
    with pytest.raises(ValueError, match="longer than 0"):
        await store.put("a", "x", ttl_s=0.0)


async def test_clusters_in_one_redis_do_not_see_each_other(redis_server: RedisServer) -> None:
    one, other = RedisStore(redis_server.url, "one"), RedisStore(redis_server.url, "other")
    await one.put("a", "x")
    assert await other.get("a") is None
    assert (await other.list("")).entries == ()
    await one.close()
    await other.close()


async def test_an_unreachable_redis_is_named_without_its_password() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = taken.getsockname()[1]
        store = RedisStore(f"redis://user:hunter2@127.0.0.1:{port}/0", "c")
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}/0 does not answer") as caught:
            await store.check()
        assert "hunter2" not in str(caught.value)
        await store.close()


async def test_a_watch_outlives_a_restart_of_redis_and_tells_of_the_new_epoch(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    store = RedisStore(server.url, "c")
    try:
        async with asyncio.timeout(BOUND_S), contextlib.aclosing(store.watch("workers/")) as snapshots:
            await store.put("workers/a", "x", ttl_s=60.0)
            before = await anext(snapshots)
            assert len(before.entries) == 1
            server.stop()
            server.start()
            after = await anext(snapshots)
            assert after.entries == () and after.epoch != before.epoch
    finally:
        await store.close()
        server.stop()


async def test_allowances_are_shared_as_the_buckets_in_memory_share_them(store: Store) -> None:
    draw = Draw("t/requests", 7.0, 10.0, 0.0)
    assert [given.amount for given in await store.ask([draw, draw, draw])] == [7.0, 3.0, 0.0]
    (back,) = await store.ask([replace(draw, want=-4.0)])
    assert (back.amount, back.left) == (-4.0, 4.0)
    (full,) = await store.ask([replace(draw, want=-400.0)])
    assert full.left == 10.0, "no more than it holds"
    first, other, more = await store.ask(
        [Hold("t/places", "a", 6, 8, 60.0), Hold("t/places", "b", 6, 8, 60.0), Hold("t/places", "a", 8, 8, 60.0)]
    )
    assert (first.amount, other.amount, more.amount, more.left) == (6, 2, 6, 0), "an owner holds so many in all"
    gone, rest = await store.ask([Hold("t/places", "a", 0, 8, 60.0), Hold("t/places", "c", 8, 8, SHORT_S)])
    assert (gone.amount, rest.amount) == (0, 6)
    async with asyncio.timeout(BOUND_S):
        while (await store.ask([Hold("t/places", "d", 6, 8, 60.0)]))[0].amount < 6:
            await asyncio.sleep(0.05)  # the lease of c ends
    assert (await store.list("")).entries == (), "they are no entries"
    slow = Draw("t/filling", 1.0, 1.0, 1000.0)
    assert (await store.ask([slow]))[0].amount == 1.0
    async with asyncio.timeout(BOUND_S):
        while (await store.ask([slow]))[0].amount < 0.5:
            pass
