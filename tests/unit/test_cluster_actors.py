"""Actors in a real Ray on this host: a killed worker comes back by itself, newer, in its role, and the router is told."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import builders
import pytest
import ray
from ray.util.placement_group import placement_group_table

from cluster import processes
from cluster.config import ClusterConfig, load_config
from cluster.launch import StartFailed, remove_actors, stop_actors, wait_ready
from cluster.local import end_local, make_folder, start_ray
from cluster.membership import WORKERS, Registration
from cluster.placement import NoRoom
from cluster.pools import Pools
from cluster.store.actor_store import ActorStore
from cluster.store.open import open_store
from cluster.store.store import Snapshot, Store
from workers.config import WorkerConfig
from workers.engine_thread import DumpKv
from workers.errors import InvalidConfig
from workers.status import Role
from workers.worker import Worker

BOUND_S = 60.0
MODEL = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One Ray for this file; afterwards no process and no file of it is left."""
    # Actors run without this folder on their path: what the tests hand them travels whole.
    for module in (builders, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    folder = make_folder()
    config = load_config(None, {"worker.model": "fake", "ray.dashboard": False})
    try:
        session = start_ray(config.ray, 2, folder)
        assert session.address.startswith("127.0.0.1:") and not session.is_exposed
        members = processes.family(folder)
        assert any("gcs_server" in process.command for process in members)
        yield
        assert session.stop() == ()
        assert processes.alive(members) == ()
        assert not os.path.exists(folder)
    finally:
        end_local(folder, 0.0)


class Pool:
    """One namespace: a cluster of its own in the shared Ray."""

    def __init__(self) -> None:
        flags = {"worker.model": str(MODEL), "ray.namespace": uuid.uuid4().hex, "store.lease_ttl_s": 3.0}
        self.config: ClusterConfig = load_config(None, {**flags, "router.port": 0})
        self.pools = Pools(self.config)
        self.controller = self.pools.create_controller()
        self.store: Store = open_store(self.config.store, self.config.ray.namespace)
        self.actors: list[Any] = []

    async def worker(self, worker_id: str, role: Role, factory: Any = None) -> Any:
        actor = self.pools.create_worker(worker_id, role, factory or make_fake_worker)
        self.actors.append(actor)
        await wait_ready({worker_id: actor}, BOUND_S)
        return actor

    async def until(self, condition: Callable[[dict[str, Registration]], bool]) -> dict[str, Registration]:
        """The registrations, as soon as they meet the condition."""
        async with asyncio.timeout(BOUND_S), aclosing(self.store.watch(WORKERS)) as snapshots:
            async for snapshot in snapshots:
                workers = registrations(snapshot)
                if condition(workers):
                    return workers
        raise AssertionError("the watch ended")


def registrations(snapshot: Snapshot) -> dict[str, Registration]:
    read = [Registration.decode(entry.value) for entry in snapshot.entries]
    return {worker.address.worker_id: worker for worker in read if worker is not None}


@pytest.fixture
async def pool(ray_here: None) -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    await stop_actors(pool.actors, 10.0)
    remove_actors([*pool.actors, pool.controller])


def make_fake_worker(
    config: WorkerConfig, worker_id: str, start_count: int, role: Role, on_role_change: Callable[[Role, int], None]
) -> SwitchableWorker:
    return SwitchableWorker(config, worker_id, start_count, role, on_role_change)


class SwitchableWorker(Worker):
    """A real worker on a fake model."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, load=builders.FakeModel)


class MortalWorker(SwitchableWorker):
    """On its first start the engine thread breaks, as by a bug."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._is_first = args[2] == 1

    async def start(self) -> Any:
        address = await super().start()
        if self._is_first:
            assert self._thread is not None
            self._thread._engine.step = None  # type: ignore[method-assign,assignment]
            self._thread.post(DumpKv())  # wakes it
        return address


def make_mortal_worker(*args: Any) -> MortalWorker:
    return MortalWorker(*args)


def make_broken_worker(*args: Any) -> Any:
    raise InvalidConfig("the checkpoint lacks weights")


async def kill(actor: Any) -> int:
    """SIGKILL to the actor's process; returns its id."""
    pid: int = await actor.pid.remote()
    os.kill(pid, signal.SIGKILL)
    return pid


async def test_a_killed_worker_returns_with_its_name_a_higher_generation_and_its_switched_role(pool: Pool) -> None:
    actor = await pool.worker("decode-0", Role.DECODE)
    before = (await pool.store.list(WORKERS)).entries
    old = registrations(await pool.store.list(WORKERS))["decode-0"]
    assert old.role is Role.DECODE and len(before) == 1

    await actor.set_role.remote(Role.MIXED)
    switched = (await pool.until(lambda workers: workers["decode-0"].role is Role.MIXED))["decode-0"]
    assert switched.address.generation == old.address.generation + 1

    await kill(actor)
    back = await pool.until(
        lambda workers: "decode-0" in workers and workers["decode-0"].address.generation > switched.address.generation
    )
    assert back["decode-0"].role is Role.MIXED
    assert back["decode-0"].address.generation >> 32 == (old.address.generation >> 32) + 1
    assert (await pool.pools.find("decode-0").status.remote()).role is Role.MIXED


async def test_a_worker_whose_engine_thread_died_is_started_again(pool: Pool) -> None:
    pool.actors.append(pool.pools.create_worker("mixed-0", Role.MIXED, make_mortal_worker))
    back = await pool.until(lambda workers: "mixed-0" in workers and workers["mixed-0"].address.generation >= 2 << 32)
    assert back["mixed-0"].role is Role.MIXED


async def test_a_router_hears_of_workers_that_come_die_return_and_leave(pool: Pool) -> None:
    router = pool.pools.create_router("router-0")
    pool.actors.append(router)
    prefill = await pool.worker("prefill-0", Role.PREFILL)
    await pool.worker("decode-0", Role.DECODE)
    await wait_ready({"router-0": router}, BOUND_S)

    async def connected(expected: dict[str, int]) -> None:
        """Waits for the router to hold streams to exactly these starts of these workers."""
        async with asyncio.timeout(BOUND_S):
            while True:
                views = (await router.status.remote()).workers
                if {v.status.worker_id: v.status.generation >> 32 for v in views if v.connected} == expected:
                    return
                await asyncio.sleep(0.05)  # the router tells nobody of a change: it is asked

    await connected({"prefill-0": 1, "decode-0": 1})
    await kill(prefill)
    await connected({"prefill-0": 2, "decode-0": 1})
    await prefill.stop.remote()
    await connected({"decode-0": 1})


async def test_a_controller_that_died_comes_back_empty_and_everybody_registers_again(pool: Pool) -> None:
    await pool.worker("mixed-0", Role.MIXED)
    before = await pool.store.list(WORKERS)
    await kill(pool.controller)
    after = await pool.until(lambda workers: "mixed-0" in workers)
    async with asyncio.timeout(BOUND_S), aclosing(pool.store.watch(WORKERS)) as snapshots:
        async for snapshot in snapshots:
            if snapshot.epoch != before.epoch and snapshot.entries:
                break
    assert registrations(snapshot) == registrations(before)
    assert after == registrations(before)
    assert await pool.store.increment("starts/mixed-0") == 2, "the start count went on from what the worker knows"


async def test_a_worker_that_cannot_start_says_why_in_one_sentence(pool: Pool) -> None:
    with pytest.raises(InvalidConfig, match="prefill-0 cannot start: the checkpoint lacks weights"):
        await pool.worker("prefill-0", Role.PREFILL, make_broken_worker)


async def test_a_name_that_is_taken_is_refused(pool: Pool) -> None:
    await pool.worker("decode-0", Role.DECODE)
    with pytest.raises(InvalidConfig, match="'decode-0' runs already"):
        pool.pools.create_worker("decode-0", Role.DECODE, make_fake_worker)


async def test_ranks_that_ray_has_no_room_for_are_refused_with_figures_and_leave_nothing_behind(pool: Pool) -> None:
    parallel = ["worker.parallel.expert_parallel=2", "ray.actor_cpus=1.5", "ray.placement_timeout_s=1"]
    flags = {"worker.model": str(MODEL), "ray.namespace": pool.config.ray.namespace}
    pools = Pools(load_config(None, flags, parallel))
    with pytest.raises(NoRoom, match=r"2 ranks of decode-0: they need 3 CPU \([\d.]+ of 2 free\) on 1 node"):
        await asyncio.to_thread(pools.create_worker, "decode-0", Role.DECODE)
    assert pools.find("decode-0") is None
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


async def test_a_start_that_hangs_is_named(pool: Pool) -> None:
    actor = pool.pools.create_worker("decode-0", Role.DECODE, make_hanging_worker)
    pool.actors.append(actor)
    with pytest.raises(StartFailed, match=r"decode-0 did not start within 0\.2 s"):
        await wait_ready({"decode-0": actor}, 0.2)


class HangingWorker:
    async def start(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        pass


def make_hanging_worker(*args: Any) -> Any:
    return HangingWorker()


async def test_the_controllers_store_keeps_the_stores_promises(pool: Pool) -> None:
    store = pool.store
    assert isinstance(store, ActorStore)
    async with asyncio.timeout(BOUND_S), aclosing(store.watch("a/")) as snapshots:
        assert (await anext(snapshots)).entries == ()
        version = await store.put("a/1", "x", ttl_s=0.3)
        assert [entry.value for entry in (await anext(snapshots)).entries] == ["x"]
        assert await store.renew("a/1", version, 0.3)
        assert (await anext(snapshots)).entries == (), "the lease ended"
    assert await store.compare_and_set("b", 0, "1") is not None
    assert await store.compare_and_set("b", 0, "2") is None
    assert await store.increment("count") == 1
    entry = await store.get("b")
    assert entry is not None and entry.value == "1"
    assert await store.delete("b") and await store.get("b") is None
