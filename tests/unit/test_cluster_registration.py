"""A worker's entries in the store: lease, start count and desired role, through switches, rivals and a store that forgets."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.actors import process, worker_actor
from cluster.config import check_roles
from cluster.membership.membership import (
    Registration,
    Superseded,
    desired_draining,
    desired_role,
    forget_draining,
    forget_role,
    resolve_role,
)
from cluster.membership.registration import MAX_START, Registrar, follow_members, number_start
from cluster.membership.steady_time import SteadyTime
from cluster.store.memory import MemoryStore
from cluster.store.store import StoreConfig
from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.status import Role, WorkerAddress
from workers.trust.config import TlsConfig

BOUND_S = 10.0
LONG_S = 60.0


async def start(
    store: MemoryStore, worker_id: str = "decode-0", role: Role = Role.DECODE, ttl_s: float = LONG_S, now_s: float = 1.0
) -> Registrar:
    """What a WorkerActor does at its start."""
    count = await number_start(store, worker_id, now_s)
    wanted = await desired_role(store, worker_id, role)
    address = WorkerAddress(worker_id, count << 32, f"127.0.0.1:{count}")
    return Registrar(store, Registration(address, wanted), role, count, ttl_s)


async def registered(store: MemoryStore) -> list[Registration | None]:
    return [Registration.decode(entry.value) for entry in (await store.list("workers/")).entries]


async def test_each_start_registers_with_a_higher_generation() -> None:
    store = MemoryStore()
    first = await start(store)
    await first.register()
    second = await start(store)
    await second.register()
    assert await registered(store) == [second.registration]
    assert second.registration.address.generation > first.registration.address.generation


async def test_a_store_that_dies_with_the_worker_does_not_make_the_next_start_look_like_the_last() -> None:
    before = await start(MemoryStore(), now_s=1000.0)
    await before.register()
    empty = MemoryStore()
    again = await start(empty, now_s=1002.5)
    await again.register()
    assert again.registration.address.generation > before.registration.address.generation


async def test_a_start_that_no_generation_could_hold_is_refused() -> None:
    store = MemoryStore()
    await store.put("starts/decode-0", str(MAX_START))
    with pytest.raises(InvalidConfig, match="delete starts/decode-0"):
        await number_start(store, "decode-0", 1.0)


@pytest.mark.parametrize("junk", ["not a number", "-5", "1e999", "٣", "9" * 300, ""])
async def test_a_number_of_starts_that_is_none_stops_nobody(junk: str) -> None:
    store = MemoryStore()
    await store.put("starts/decode-0", junk)
    registrar = await start(store, now_s=1000.0)
    await registrar.register()
    assert await registered(store) == [registrar.registration]


async def test_a_clock_that_was_set_back_gives_a_higher_number_all_the_same() -> None:
    store = MemoryStore()
    before = await number_start(store, "decode-0", 2000.0)
    assert await number_start(store, "decode-0", 1000.0) == before + 1


async def test_a_clock_that_was_set_back_while_the_store_died_gives_a_higher_number_too() -> None:
    clock = SteadyTime.here()
    before = await number_start(MemoryStore(), "decode-0", clock.now_s())
    year_ago = time.time() - 365 * 86400
    after = await number_start(MemoryStore(), "decode-0", clock.now_s(wall=lambda: year_ago))
    assert after >= before
    assert replace(clock, boot_id="another host's").now_s(wall=lambda: year_ago) == year_ago


async def test_an_older_start_can_neither_register_nor_keep_nor_remove_the_newer_ones_lease() -> None:
    store = MemoryStore()
    old = await start(store, ttl_s=0.3)
    await old.register()
    new = await start(store)
    await new.register()
    with pytest.raises(Superseded):
        await old.register()
    with pytest.raises(Superseded):
        await asyncio.wait_for(old.run(), BOUND_S)
    await old.withdraw()
    assert await registered(store) == [new.registration]


class Worker:
    """Computes nothing; serves as what a WorkerActor holds."""

    def __init__(self, config: WorkerConfig, worker_id: str, start: int, role: Role, *_: object) -> None:
        self._address = WorkerAddress(worker_id, start << 32, "127.0.0.1:1")

    async def start(self) -> WorkerAddress:
        return self._address

    def watch_draining(self, on_change: object) -> None: ...


async def test_an_actor_whose_worker_was_superseded_ends_for_good_and_faults_of_its_gauges_do_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asked = asyncio.Event()

    def no_gauges(*_: object) -> None:
        asked.set()
        raise OSError("Ray makes no gauges")

    def end(how: str) -> None:
        if not ended.done():
            ended.set_result(how)

    monkeypatch.setattr(worker_actor, "open_store", lambda *_: store)
    monkeypatch.setattr(process, "write_logs", lambda *_: None)
    monkeypatch.setattr(worker_actor, "leave_what_is_there", lambda: None)
    monkeypatch.setattr(worker_actor, "RayGauges", no_gauges)
    monkeypatch.setattr(process, "leave_for_good", lambda: end("for good"))
    monkeypatch.setattr(os, "_exit", lambda code: end(f"with {code}"))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    actor = worker_actor.WorkerActor(
        "decode-0", WorkerConfig("fake"), Role.DECODE, StoreConfig(lease_ttl_s=0.5), "baton", TlsConfig("off"),
        SteadyTime("", 0.0), Worker,
    )  # fmt: skip
    async with asyncio.timeout(BOUND_S):
        await actor.ready()
        await asked.wait()
        assert not ended.done()
        newer = await start(store)
        await newer.register()
        assert await ended == "for good"
    assert await registered(store) == [newer.registration]


async def test_a_switch_is_written_at_once_and_outlives_the_worker() -> None:
    store = MemoryStore()
    registrar = await start(store)
    await registrar.register()
    running = asyncio.create_task(registrar.run())
    async with asyncio.timeout(BOUND_S), aclosing(follow_members(store, LONG_S)) as changes:
        async for members in changes:
            if members[0].role is Role.MIXED:
                break
            registrar.change_role(Role.MIXED, (1 << 32) + 1)
    running.cancel()
    again = await start(store)
    assert again.registration.role is Role.MIXED


async def test_switching_back_leaves_nothing_to_remember() -> None:
    store = MemoryStore()
    registrar = await start(store)
    registrar.change_role(Role.PREFILL, (1 << 32) + 1)
    await registrar.register()
    assert len((await store.list("roles/")).entries) == 1
    registrar.change_role(Role.DECODE, (1 << 32) + 2)
    await registrar.register()
    assert (await store.list("roles/")).entries == ()


async def test_a_drain_outlives_the_worker_until_it_is_undone_or_forgotten() -> None:
    store = MemoryStore()
    registrar = await start(store)
    await registrar.register()
    assert not await desired_draining(store, "decode-0")
    running = asyncio.create_task(registrar.run())
    async with asyncio.timeout(BOUND_S), aclosing(store.watch("drains/")) as snapshots:
        async for snapshot in snapshots:
            if snapshot.entries:
                break
            registrar.change_draining(True)
    assert await desired_draining(store, "decode-0") and not await desired_draining(store, "decode-1")
    async with asyncio.timeout(BOUND_S), aclosing(store.watch("drains/")) as snapshots:
        async for snapshot in snapshots:
            if not snapshot.entries:
                break
            registrar.change_draining(False)
    running.cancel()
    registrar.change_draining(True)
    await registrar.register()
    await forget_draining(store, "decode-0")
    assert not await desired_draining(store, "decode-0")


async def test_a_forgotten_role_gives_way_to_the_configured_one() -> None:
    store = MemoryStore()
    await store.put("roles/decode-0", "mixed")
    await forget_role(store, "decode-0")
    assert await desired_role(store, "decode-0", Role.DECODE) is Role.DECODE


async def test_a_lease_is_renewed_for_as_long_as_the_worker_runs() -> None:
    store = MemoryStore()
    registrar = await start(store, ttl_s=0.3)
    await registrar.register()
    version = (await store.list("workers/")).entries[0].version
    running = asyncio.create_task(registrar.run())
    # A lease that began later and lasts twice as long has ended: the renewed one has been renewed.
    await store.put("workers/other", "x", ttl_s=0.6)
    async with asyncio.timeout(BOUND_S), aclosing(store.watch("workers/")) as snapshots:
        async for snapshot in snapshots:
            if len(snapshot.entries) == 1:
                break
    assert [(entry.key, entry.version) for entry in snapshot.entries] == [("workers/decode-0", version)]
    running.cancel()


async def test_a_worker_that_leaves_is_gone_at_once() -> None:
    store = MemoryStore()
    registrar = await start(store)
    await registrar.register()
    await registrar.withdraw()
    assert await registered(store) == []


async def test_a_store_that_forgot_everything_learns_it_again_from_the_worker() -> None:
    before = MemoryStore()
    await before.put("starts/decode-0", "6")
    registrar = await start(before)
    registrar.change_role(Role.MIXED, (7 << 32) + 1)

    after = MemoryStore()
    registrar._store = after
    await registrar.register()
    assert await number_start(after, "decode-0", 3.0) == 8, "the next start is newer than this one, by whatever clock"
    assert await desired_role(after, "decode-0", Role.DECODE) is Role.MIXED


@pytest.mark.parametrize(
    ("remembered", "expected"), [(None, Role.DECODE), ("mixed", Role.MIXED), ("from another version", Role.DECODE)]
)
def test_a_remembered_role_wins_if_it_is_one(remembered: str | None, expected: Role) -> None:
    assert resolve_role(Role.DECODE, remembered) is expected


@pytest.mark.parametrize(
    ("counts", "message"),
    [((0, 1, 0), "no worker could prefill"), ((1, 0, 0), "no worker could decode")],
)
def test_pools_that_cannot_serve_are_refused(counts: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        check_roles(*counts)
    check_roles(0, 0, 1)
    check_roles(1, 1, 0)
