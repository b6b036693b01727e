"""Brings a whole cluster up, step by step with a bound on each, and takes all of it down again."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.actors.held_ports import PortHolder
from cluster.actors.waiting import remove_actors, stop_actors, wait_ready, watched
from cluster.config import ClusterConfig
from cluster.console.output import StepPrinter
from cluster.identity.local import certified, needs_certificates, publish
from cluster.preflight import (
    check_cache_folder,
    check_disk_tier,
    check_gpus,
    check_layout,
    check_memory,
    check_model,
    check_port,
    check_processors,
    check_store,
    check_tokenizer,
    file_limit_warning,
)
from cluster.ray_session.deaths import vital_processes, watch
from cluster.ray_session.folders import end_local, make_folder, remove_stale, secret_file
from cluster.ray_session.janitor import dismiss, engage
from cluster.ray_session.processes import Process
from cluster.ray_session.room import watch_room
from cluster.ray_session.running import note
from cluster.ray_session.session import RaySession, join_ray, start_ray
from cluster.steps import AT_ONCE, all_of, bounded
from cluster.store.actor_store import STORE_HOST_NAME
from router.https import Certificate
from workers.errors import InvalidConfig
from workers.machine.limits import usable_cpus


@dataclass(slots=True)
class Cluster:
    """A running cluster: where it is reached, and its actors by name."""

    config: ClusterConfig
    session: RaySession
    store_host: Any = None
    """Held: Ray ends an actor that nobody holds."""
    urls: tuple[str, ...] = ()
    workers: dict[str, Any] = field(default_factory=dict)
    routers: dict[str, Any] = field(default_factory=dict)
    pools: Any = None
    """Who created the actors: it also holds the further ranks of workers."""
    held_ports: PortHolder | None = None
    """The routers' ports, where their processes are on this host."""
    vital: dict[str, Process] = field(default_factory=dict)
    """Those of Ray's processes that the cluster cannot do without, where Ray was started for it."""

    @property
    def url(self) -> str:
        """The first router's URL."""
        return self.urls[0]

    async def until_ray_dies(self, meanwhile: Coroutine[Any, Any, None], say: Callable[[str], None]) -> None:
        """Does `meanwhile`, for as long as a Ray that was started here lives; what becomes of its disk is told. Raises RayDied."""
        jobs = {asyncio.ensure_future(meanwhile)}
        if self.session.folder:
            jobs.add(asyncio.ensure_future(watch(self.vital)))
            jobs.add(asyncio.ensure_future(watch_room(self.session.folder, say)))
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)


async def preflight(config: ClusterConfig) -> None:
    """Refuses within a moment what cannot work. Raises InvalidConfig."""
    check_model(config.worker.model)
    check_layout(config.worker)
    config.tls.check_host(config.worker.host)
    check_gpus(config)
    check_processors(config)
    if config.router.model != config.worker.model:
        check_tokenizer(config.router.model)
    if config.router.cert_file:
        Certificate(config.router.cert_file, config.router.key_file)
    for at in range(config.pools.routers):
        router = config.router_at(at)
        check_port(router.host, router.port, "--port")
    check_memory(config)
    check_disk_tier(config.worker, len(config.pools.workers))
    check_cache_folder(config.worker)
    await check_store(config.store)


@asynccontextmanager
async def launched(config: ClusterConfig, progress: StepPrinter, folder: str = "") -> AsyncIterator[Cluster]:
    """A cluster that serves; left, it is gone with every process and file. Raises InvalidConfig, RayFailed, ActorFailed,
    StartFailed.

    A Ray that is started here keeps its files in `folder` (a new temporary one when empty).
    """
    await preflight(config)
    if warning := file_limit_warning(config):
        progress.say(warning)
    for stale in await asyncio.to_thread(remove_stale):
        progress.say(f"removed {stale}, which a cluster that was killed had left")
    folder = "" if config.ray.address else folder or make_folder()
    if config.store.url != "memory" and not config.store.secret_file:
        config = with_secret(config, secret_file(folder) if folder else "")
    certificates = ""
    cluster: Cluster | None = None
    janitor = engage(folder) if folder else None
    try:
        if needs_certificates(config.tls):
            certificates = folder or make_folder()
            config = await asyncio.to_thread(certified, config, certificates)
        session = await _connect(config, folder, progress)
        rearm_signals()
        if session.is_exposed:
            progress.say(
                f"Ray listens on {session.node_ip}: whoever has its token could run code here from other hosts"
            )
        cluster = Cluster(config, session)
        if folder:
            cluster.vital = await asyncio.to_thread(vital_processes, folder)
            note(folder, session.address)
        await cluster.until_ray_dies(_populate(cluster, progress), progress.say)
        if folder:
            note(folder, session.address, cluster.urls)
        yield cluster
    finally:
        # Once here, a further cancellation must not leave half of the processes behind.
        await asyncio.shield(asyncio.ensure_future(_take_down(cluster, folder, progress)))
        if janitor is not None:
            dismiss(janitor)
        if certificates not in ("", folder):
            await asyncio.to_thread(end_local, certificates, 0.0)


def with_secret(config: ClusterConfig, path: str) -> ClusterConfig:
    """The entries in Redis signed with the secret at `path`. Raises InvalidConfig when there is none."""
    if not path:
        raise InvalidConfig(
            "entries in Redis are signed, and this cluster's secret is not known here: name the file that holds it, the same on "
            "every host (store.secret_file)"
        )
    return replace(config, store=replace(config.store, secret_file=path))


async def _connect(config: ClusterConfig, folder: str, progress: StepPrinter) -> RaySession:
    if config.ray.address:
        with progress.step(f"joining Ray at {config.ray.address}"):
            return await bounded(
                asyncio.to_thread(join_ray, config.ray.address, config.ray.namespace, config.ray.token_file),
                config.start_timeout_s,
                f"Ray at {config.ray.address} did not answer",
            )
    num_actors = len(config.pools.workers) * config.worker.parallel.size + config.pools.routers + 1
    num_cpus = max(usable_cpus(), round(num_actors * config.ray.actor_cpus + 1))
    with progress.step("starting Ray"):
        return await bounded(
            asyncio.to_thread(start_ray, config.ray, num_cpus, folder),
            config.start_timeout_s,
            "Ray did not start",
        )


def rearm_signals() -> None:
    """Puts Python's signal handlers back: Ray's C++ part has laid its own over them, which print a stack and abort."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_DFL, signal.SIG_IGN):
                signal.signal(number, handler)
                signal.siginterrupt(number, False)


async def _populate(cluster: Cluster, progress: StepPrinter) -> None:
    """The store first, as every other actor needs the store; then workers and routers at the same time."""
    from cluster.actors.pools import Pools
    from cluster.membership.membership import forget_draining, forget_role
    from cluster.ray_session.failures import told
    from cluster.roles.fresh import forget_switches
    from cluster.store.open import open_store

    config = cluster.config
    pools = cluster.pools = Pools(config)
    if config.store.url == "memory":
        with progress.step("starting the store"):
            cluster.store_host = await asyncio.to_thread(pools.create_store_host)
            await wait_ready({STORE_HOST_NAME: cluster.store_host}, config.start_timeout_s)
    store = open_store(config.store, config.ray.namespace)
    # A new cluster starts in its configured roles, and takes work.
    names = [name for name, _ in config.pools.workers]
    await all_of([forget(store, name) for name in names for forget in (forget_role, forget_draining, forget_switches)])
    await publish(store, config)
    await store.close()
    threads = ThreadPoolExecutor(AT_ONCE, "create")  # each waits for Ray: to look a name up, to find room for ranks

    holder = cluster.held_ports = PortHolder(cluster.session.folder) if cluster.session.folder else None

    def make_router(name: str, at: int) -> Any:
        if holder is None or config.pools.share_port:  # a port that others share is open when one of them dies
            return pools.create_router(name, at)
        router = config.router_at(at)
        holder.hold(name, router.host, router.port)
        return pools.create_router(name, at, holder.path)

    async def create(into: dict[str, Any], name: str, make: Callable[..., Any], argument: Any) -> None:
        with told(name):
            into[name] = await asyncio.get_running_loop().run_in_executor(threads, make, name, argument)

    router_names = [f"router-{at}" for at in range(config.pools.routers)]
    try:
        await all_of(
            [create(cluster.workers, name, pools.create_worker, role) for name, role in config.pools.workers]
            + [create(cluster.routers, name, make_router, at) for at, name in enumerate(router_names)]
        )
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # whoever interrupts the start does not wait for Ray
    cluster.workers = {name: cluster.workers[name] for name in names}
    cluster.routers = {name: cluster.routers[name] for name in router_names}
    with progress.step(f"loading {', '.join((*cluster.workers, *cluster.routers))}"):
        ranks = {rank: actor for name in cluster.workers for rank, actor in pools.ranks_of(name).items()}
        async with watched(cluster.workers, progress):
            await wait_ready({**cluster.workers, **ranks, **cluster.routers}, config.start_timeout_s)
        with told("a router"):
            urls = [_reachable(await actor.ready.remote()) for actor in cluster.routers.values()]
            cluster.urls = tuple(dict.fromkeys(urls))
    with progress.step("connecting routers to workers"):
        for name, actor in cluster.routers.items():
            with told(name):
                await bounded(actor.until_ready.remote(), config.start_timeout_s, f"{name} found no workers")


def _reachable(url: str) -> str:
    """A router that listens on every address is reached here at the loopback one."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


async def _take_down(cluster: Cluster | None, folder: str, progress: StepPrinter) -> None:
    """Routers first, so that no request reaches a worker that leaves; then workers; then Ray itself."""
    if cluster is not None:
        config = cluster.config
        if cluster.held_ports is not None:
            cluster.held_ports.close()
        with progress.step("finishing what runs, and stopping routers"):
            await stop_actors([*cluster.routers.values()], config.router.shutdown_timeout_s + config.stop_timeout_s)
        with progress.step("stopping workers"):
            await stop_actors([*cluster.workers.values()], config.stop_timeout_s)
        if cluster.config.ray.address:
            await asyncio.to_thread(remove_actors, [*cluster.routers.values()])
            for name in cluster.workers:
                await asyncio.to_thread(cluster.pools.remove_worker, name)
    with progress.step("stopping Ray"):
        if cluster is not None:
            left = await asyncio.to_thread(cluster.session.stop)
        else:
            left = await asyncio.to_thread(end_local, folder, 3.0) if folder else ()
    if left:
        progress.say(f"could not end these processes: {', '.join(str(process.pid) for process in left)}")
