"""Actors in a real Ray on this host: a killed worker comes back by itself, newer, in its role, and the router is told."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import json
import operator
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import byte_tokens
import httpx
import pytest
import ray
import ray_listens
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.util.placement_group import placement_group_table

from cluster.actors.placement import NoRoom
from cluster.actors.pools import Pools
from cluster.actors.waiting import remove_actors, stop_actors, wait_ready
from cluster.config import ClusterConfig, load_config
from cluster.membership.membership import WORKERS, Registration
from cluster.ray_session import processes
from cluster.ray_session.defaults import PRIVATE_NAMES
from cluster.ray_session.failures import ActorFailed, explain, told
from cluster.ray_session.folders import end_local, make_folder
from cluster.ray_session.running import note, with_ray
from cluster.ray_session.session import start_ray
from cluster.steps import StartFailed
from cluster.store.actor_store import ActorStore
from cluster.store.open import open_store
from cluster.store.store import Snapshot, Store
from workers.config import WorkerConfig
from workers.engine.messages import DumpKv
from workers.errors import InvalidConfig
from workers.status import Role, starts_of
from workers.worker import Worker

BOUND_S = 60.0
MODEL = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names that Baton and Python import; whoever imports one from here fails."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("router", "workers", "cluster", "models"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('imported from the current folder')\n")
    for name in ("torch", "queue", "numpy", "socket"):
        (folder / f"{name}.py").write_text("raise RuntimeError('imported from the current folder')\n")
    return folder


@pytest.fixture(scope="module")
def ray_here(hostile_folder: Path) -> Iterator[str]:
    """One Ray for this file, started from a folder that shadows every import; afterwards no process and no file of it is left."""
    # Actors run without this folder on their path: what the tests hand them travels whole.
    for module in (byte_tokens, builders, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    folder = make_folder()
    os.environ.update(RAY_metrics_report_interval_ms="1000")  # nobody waits for 10 s here
    config = load_config(None, {"worker.model": "fake", "ray.dashboard": False})
    try:
        with contextlib.chdir(hostile_folder):
            session = start_ray(config.ray, 2, folder)
        assert session.address.startswith("127.0.0.1:") and not session.is_exposed
        note(folder, session.address)
        members = processes.family(folder)
        assert any("gcs_server" in process.command for process in members)
        yield session.address
        assert session.stop() == ()
        assert processes.alive(members) == ()
        assert not os.path.exists(folder)
    finally:
        end_local(folder, 0.0)


class Pool:
    """One namespace: a cluster of its own in the shared Ray."""

    def __init__(self) -> None:
        flags = {
            "worker.model": str(MODEL),
            "ray.namespace": uuid.uuid4().hex,
            "store.lease_ttl_s": 3.0,
            "tls.mode": "off",
        }
        self.config: ClusterConfig = load_config(None, {**flags, "router.port": 0})
        self.pools = Pools(self.config)
        self.store_host = self.pools.create_store_host()
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
async def pool(ray_here: str) -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    await stop_actors(pool.actors, 10.0)
    remove_actors([*pool.actors, pool.store_host])


def make_fake_worker(
    config: WorkerConfig, worker_id: str, start_count: int, role: Role, on_role_change: Callable[[Role, int], None]
) -> SwitchableWorker:
    return SwitchableWorker(config, worker_id, start_count, role, on_role_change)


class SwitchableWorker(Worker):
    """A real worker on a fake model."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, load=builders.FakeModel)


class MortalWorker(SwitchableWorker):
    """Leaves a file for each start in its cache_folder. After the first one the engine thread breaks, as by a bug."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        folder = Path(self._config.cache_folder)
        self._is_first = not list(folder.glob("start-*"))
        (folder / f"start-{args[2]}").touch()

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


def num_left_alone(actor: Any) -> int:
    """Called in the actor's process: the objects that its garbage collector looks at no more."""
    return gc.get_freeze_count()


async def kill(actor: Any) -> int:
    """SIGKILL to the actor's process; returns its id."""
    pid: int = await actor.pid.remote()
    os.kill(pid, signal.SIGKILL)
    return pid


def look_around() -> dict[str, Any]:
    """Run in an actor: what Ray has made of its process."""
    return {"niceness": os.nice(0), "path": sys.path, "folder": os.getcwd()}


def test_actors_run_at_the_priority_of_baton_itself_and_are_not_killed_for_a_strangers_memory(ray_here: str) -> None:
    found = ray.get(ray.remote(look_around).remote(), timeout=BOUND_S)
    assert found["niceness"] == os.nice(0)
    raylets = [p for p in processes.snapshot().values() if p.parent == os.getpid() and "/raylet " in p.command]
    assert raylets
    for raylet in raylets:
        assert b"RAY_memory_monitor_refresh_ms=0" in Path(f"/proc/{raylet.pid}/environ").read_bytes().split(b"\0")


def test_nothing_is_imported_from_the_folder_that_ray_is_started_or_joined_in(
    ray_here: str, hostile_folder: Path
) -> None:
    def leaks(path: list[str], folder: str) -> list[str]:
        return [entry for entry in path if not entry or Path(entry).resolve() in (hostile_folder, Path(folder))]

    found = ray.get(ray.remote(look_around).remote(), timeout=BOUND_S)
    assert leaks(found["path"], found["folder"]) == []
    script = (
        "import json, os, sys, ray; from cluster.ray_session.session import join_ray; join_ray(sys.argv[1], 'guest');"
        "look = ray.remote(lambda: {'path': sys.path, 'folder': os.getcwd()});"
        "print(json.dumps(ray.get(look.remote(), timeout=60)))"
    )
    command = [sys.executable, "-P", "-c", script, ray_here]
    here = {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[2])}
    joined = subprocess.run(command, cwd=hostile_folder, env=here, capture_output=True, text=True, timeout=BOUND_S)
    assert joined.returncode == 0, joined.stderr
    found = json.loads(joined.stdout)
    assert leaks(found["path"], found["folder"]) == []
    assert [entry for entry in found["path"] if (Path(entry) / "cluster" / "cli.py").is_file()], "Baton is found"


@pytest.mark.parametrize(("module", "name", "parameters"), PRIVATE_NAMES)
def test_what_baton_uses_of_rays_private_parts_is_there(
    module: str, name: str, parameters: tuple[str, ...] | None
) -> None:
    found = operator.attrgetter(name)(importlib.import_module(module))
    assert callable(found)
    assert parameters is None or tuple(inspect.signature(found).parameters) == parameters


def test_ray_listens_on_the_loopback_address_and_does_nothing_for_whoever_lacks_its_token(ray_here: str) -> None:
    cluster = with_ray(ray_here)
    assert cluster is not None
    assert os.stat(cluster.token_file).st_mode & 0o077 == 0 and os.stat(cluster.folder).st_mode & 0o077 == 0
    token = Path(cluster.token_file).read_text()
    ray.get(ray.remote(look_around).remote(), timeout=BOUND_S)  # so that there is an actor's process too
    listening = ray_listens.sockets(processes.family(cluster.folder))
    assert len(listening) > 5 and {address for address, _ in listening} == {"127.0.0.1"}
    answers = {port: ray_listens.knock(port) for _, port in listening}
    # 405: a page of Ray's own metrics, which takes no POST.
    assert set(answers.values()) <= {"401", "UNAUTHENTICATED", "405"}, answers
    assert sum(answer != "405" for answer in answers.values()) >= 6, answers
    assert ray_listens.knock(int(ray_here.rpartition(":")[2]), token) not in ("401", "UNAUTHENTICATED")


def test_the_token_is_in_no_command_line_and_no_environment(ray_here: str) -> None:
    cluster = with_ray(ray_here)
    assert cluster is not None
    token = Path(cluster.token_file).read_bytes()
    for process in (*processes.family(cluster.folder), *processes.snapshot().values()):
        assert token.decode() not in process.command
    for process in processes.family(cluster.folder):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            assert token not in Path(f"/proc/{process.pid}/environ").read_bytes()


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
    assert starts_of(back["decode-0"].address.generation) > starts_of(old.address.generation)
    assert (await pool.pools.find("decode-0").status.remote()).role is Role.MIXED


async def test_a_worker_whose_engine_thread_died_is_started_again(pool: Pool, tmp_path: Path) -> None:
    pools = Pools(replace(pool.config, worker=replace(pool.config.worker, cache_folder=str(tmp_path))))
    actor = pools.create_worker("mixed-0", Role.MIXED, make_mortal_worker)
    pool.actors.append(actor)
    back = await pool.until(lambda workers: "mixed-0" in workers and len(list(tmp_path.glob("start-*"))) == 2)
    assert back["mixed-0"].role is Role.MIXED


async def test_a_router_hears_of_workers_that_come_die_return_and_leave_and_so_do_rays_own_views(
    pool: Pool, ray_here: str
) -> None:
    router = pool.pools.create_router("router-0")
    pool.actors.append(router)
    prefill = await pool.worker("prefill-0", Role.PREFILL)
    await pool.worker("decode-0", Role.DECODE)
    await wait_ready({"router-0": router}, BOUND_S)

    async def connected(names: set[str], but: dict[str, int] | None = None) -> dict[str, int]:
        """Waits for the router to hold streams to exactly these workers, in other generations than `but`; returns those."""
        async with asyncio.timeout(BOUND_S):
            while True:
                views = (await router.status.remote()).workers
                found = {v.status.worker_id: v.status.generation for v in views if v.connected}
                if found.keys() == names and not found.items() & (but or {}).items():
                    return found
                await asyncio.sleep(0.05)  # the router tells nobody of a change: it is asked

    first = await connected({"prefill-0", "decode-0"})
    for actor in (router, prefill):
        assert await actor.__ray_call__.remote(num_left_alone) > 50_000, "a full collection would take too long"
    async with asyncio.timeout(BOUND_S):
        while not (listed := (await router.status.remote()).routers):
            await asyncio.sleep(0.05)
    assert [(each.router_id, each.url) for each in listed] == [("router-0", await router.ready.remote())]
    await kill(prefill)
    second = await connected({"prefill-0", "decode-0"}, but={"prefill-0": first["prefill-0"]})
    assert second["prefill-0"] > first["prefill-0"] and second["decode-0"] == first["decode-0"]
    await prefill.stop.remote()
    await connected({"decode-0"})
    figures = await ray_figures(
        'ray_baton_worker_role{.*role="decode".*worker_id="decode-0".*} 1.0',
        'ray_baton_worker_role{.*role="prefill".*worker_id="decode-0".*} 0.0',
        'ray_baton_worker_kv_used_ratio{.*worker_id="decode-0".*}',
        'ray_baton_router_num_workers{.*router_id="router-0".*} 1.0',
    )
    assert "baton_worker_num_running" in figures
    folder = Path(with_ray(ray_here).folder)  # type: ignore[union-attr]
    written = "".join(log.read_text() for log in (folder / "ray" / "session_latest" / "logs").glob("worker-*.err"))
    assert re.search(r"^\S+Z INFO +decode-0 decode-0 serves ", written, re.M), written[-2000:]
    assert re.search(r"^\S+Z INFO +router-0 .*decode-0 came", written, re.M), written[-2000:]


async def ray_figures(*wanted: str) -> str:
    """What this node's metrics port says, as soon as each of the patterns is in a line of it."""
    (node,) = ray.nodes()
    async with asyncio.timeout(BOUND_S), httpx.AsyncClient(trust_env=False) as client:
        while True:
            text = (await client.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")).text
            if all(re.search(pattern, text) for pattern in wanted):
                return text
            await asyncio.sleep(0.5)  # Ray collects at its own pace


async def test_a_store_that_died_comes_back_empty_and_everybody_registers_again(pool: Pool) -> None:
    await pool.worker("mixed-0", Role.MIXED)
    before = await pool.store.list(WORKERS)
    await kill(pool.store_host)
    after = await pool.until(lambda workers: "mixed-0" in workers)
    async with asyncio.timeout(BOUND_S), aclosing(pool.store.watch(WORKERS)) as snapshots:
        async for snapshot in snapshots:
            if snapshot.epoch != before.epoch and snapshot.entries:
                break
    assert registrations(snapshot) == registrations(before)
    assert after == registrations(before)
    known = await pool.store.get("starts/mixed-0")
    generation = registrations(before)["mixed-0"].address.generation
    assert known is not None and int(known.value) == starts_of(generation), "the store learned it from the worker"


async def test_a_worker_that_dies_together_with_the_store_comes_back_in_a_higher_generation(pool: Pool) -> None:
    worker = await pool.worker("mixed-0", Role.MIXED)
    before = registrations(await pool.store.list(WORKERS))["mixed-0"].address
    await asyncio.gather(kill(pool.store_host), kill(worker))
    await wait_until_back(worker)
    after = (await pool.until(lambda workers: "mixed-0" in workers))["mixed-0"].address
    assert after.generation > before.generation


async def wait_until_back(actor: Any) -> None:
    """Until Ray has started the actor's process again, and what is in it."""
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                await actor.ready.remote()
                return
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.05)


async def test_a_worker_that_cannot_start_says_why_in_one_sentence(pool: Pool) -> None:
    with pytest.raises(InvalidConfig, match="prefill-0 cannot start: the checkpoint lacks weights"):
        await pool.worker("prefill-0", Role.PREFILL, make_broken_worker)


async def test_what_ray_raises_about_an_actor_is_one_sentence_without_a_traceback(pool: Pool) -> None:
    worker = await pool.worker("decode-0", Role.DECODE)
    with pytest.raises(ActorFailed) as unavailable, told("decode-0"):
        await asyncio.gather(worker.group_address.remote(), kill(worker))
    with pytest.raises(ActorFailed, match="decode-0 failed: RuntimeError: the engine is gone"), told("decode-0"):
        await ray.remote(BrokenWorker).remote().ready.remote()
    remove_actors([worker])
    with pytest.raises(ActorFailed) as died, told("decode-0"):
        while True:
            await worker.pid.remote()
    for caught, text in (
        (unavailable, "the process of decode-0 died or does not answer"),
        (died, "the process of decode-0 died"),
    ):
        assert text in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
        assert "root causes" not in str(caught.value)


class BrokenWorker:
    async def ready(self) -> None:
        raise RuntimeError("the engine\nis gone")


def test_a_death_for_want_of_memory_says_so() -> None:
    assert "want of memory" in explain("decode-0", ActorDiedError(), 1)
    assert "want of memory" not in explain("decode-0", ActorDiedError(), 0)
    by_ray = explain("decode-0", OutOfMemoryError("Task was killed due to the node running low on memory."), 0)
    assert "RAY_memory_monitor_refresh_ms=0" in by_ray


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


async def test_the_actors_store_keeps_the_stores_promises(pool: Pool) -> None:
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
    entry = await store.get("b")
    assert entry is not None and entry.value == "1"
    assert await store.delete("b") and await store.get("b") is None
