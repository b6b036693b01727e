"""The Ray actors of a cluster: each holds one object, starts it, feeds it and keeps it registered. No token passes here."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from cluster.actors.ray_gauges import (
    ROUTER_GAUGES,
    WORKER_GAUGES,
    RayGauges,
    Reading,
    is_in_ray,
    keep_told,
    router_reading,
    worker_reading,
)
from cluster.config import LogConfig
from cluster.logs import write_logs
from cluster.membership.loading import follow_loading, tell_loading
from cluster.membership.membership import (
    DOUBT_LEASES,
    Registration,
    Superseded,
    desired_draining,
    desired_role,
)
from cluster.membership.registration import Registrar, follow_members, number_start
from cluster.membership.routers import ROUTERS, follow_routers, keep_listed
from cluster.membership.steady_time import SteadyTime
from cluster.ray_session.defaults import own_address
from cluster.roles.config import RolesConfig
from cluster.store.open import open_store
from cluster.store.store import Store, StoreConfig, StoreUnavailable
from cluster.tenants.driver import TenantsDriver
from cluster.tenants.records import salt_secret
from router.backend import ListedRouter
from router.config import RouterConfig
from workers.config import WorkerConfig
from workers.group.watch import GroupPlan
from workers.machine.limits import raise_file_limit
from workers.machine.threads import NUM_HELPERS, started_threads
from workers.model.checkpoint.progress import loading
from workers.status import LoadProgress, RankStatus, Role, WorkerAddress, WorkerStatus
from workers.trust import parties
from workers.trust.config import TlsConfig
from workers.trust.credentials import credentials_of

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_START_S = 5.0
"""A start that failed is told to whoever waits in ready(), and after this long tried again in a new process."""


class WorkerLike(Protocol):
    """What a WorkerActor forwards to: workers.worker.Worker, or a stand-in in tests."""

    async def start(self) -> WorkerAddress: ...

    def status(self) -> WorkerStatus: ...

    def set_role(self, role: Role) -> WorkerStatus: ...

    def set_draining(self, is_draining: bool) -> WorkerStatus: ...

    def watch_draining(self, on_change: Callable[[bool], None]) -> None: ...

    async def leave(self) -> bool: ...

    async def stop(self) -> None: ...


WorkerFactory = Callable[..., WorkerLike]
"""Called with config, worker id, the number of the start, role and on_role_change; for a worker of several ranks also with `plan`,
and with `credentials` where there are certificates."""


class Actor(ABC):
    """Starts its content from the constructor, because that is all that Ray runs again after a crash.

    A content whose thread (its name starts with one of `vital_thread`) dies is a crash too: the process ends and Ray starts it anew.
    """

    vital_thread: tuple[str, ...] = ()

    def __init__(self, name: str, log_config: LogConfig | None = None) -> None:
        self._name = name
        write_logs(log_config or LogConfig(), name)
        asyncio.get_running_loop().set_default_executor(started_threads(NUM_HELPERS, "helper"))
        raise_file_limit()  # each stream is a file, and a Ray that others have started may have left it low
        threading.excepthook = self._on_thread_died
        self._stopping = False
        self._traces: Any = None
        self._started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._life = asyncio.get_running_loop().create_task(self._live())

    def __repr__(self) -> str:
        return self._name

    async def ready(self) -> str:
        """Waits for the start; returns the address. Raises what the start raised."""
        return await asyncio.shield(self._started)

    async def pid(self) -> int:
        return os.getpid()

    async def _live(self) -> None:
        try:
            await self._run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            log.exception("%s failed", self._name)
            if not self._started.done():
                self._started.set_exception(error)
                await asyncio.sleep(RETRY_START_S)
            if isinstance(error, Superseded):
                leave_for_good()
            elif not self._stopping:
                os._exit(1)  # Ray starts the actor again, in a clean process

    def _on_thread_died(self, args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else ""
        log.critical("%s: thread %s died", self._name, name, exc_info=args.exc_value)
        if name.startswith(self.vital_thread) and not self._stopping:
            os._exit(1)

    @abstractmethod
    async def _run(self) -> None:
        """Starts the content, tells `_started`, and runs for as long as the actor lives."""

    def _export_traces(self, endpoint: str, service: str) -> None:
        """Spans of this process go to the collector, where there is one. Raises InvalidConfig."""
        if endpoint:
            self._traces = importlib.import_module("workers.trace_export").TraceExport(endpoint, service, self._name)

    async def _send_last_traces(self) -> None:
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def _end(self, *steps: Awaitable[object]) -> None:
        self._stopping = True
        self._life.cancel()
        for step in steps:
            with suppress(Exception):
                await step


class WorkerActor(Actor):
    """One worker under a name such as `decode-0`. After a crash it is back with a higher generation and its desired role.

    With `secret` it leads the ranks of a group, of which it is rank 0: the others (cluster.actors.ranks) ask it where to come.
    """

    vital_thread = ("engine", "group")

    def __init__(
        self,
        worker_id: str,
        config: WorkerConfig,
        role: Role,
        store: StoreConfig,
        namespace: str,
        tls: TlsConfig,
        clock: SteadyTime,
        factory: WorkerFactory | None = None,
        secret: str = "",
        log_config: LogConfig | None = None,
    ) -> None:
        self._secret = secret
        self._tls = tls
        self._clock = clock
        self._group_address: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
        self._config, self._role, self._store_config, self._namespace = config, role, store, namespace
        self._factory = factory
        self._worker: WorkerLike | None = None
        self._registrar: Registrar | None = None
        self._loop = asyncio.get_running_loop()
        super().__init__(worker_id, log_config)

    async def loading(self) -> LoadProgress:
        """How far it has come with its checkpoint; also before it is ready."""
        return loading()

    async def status(self) -> WorkerStatus:
        """The worker's own account of itself."""
        await self.ready()
        assert self._worker is not None
        return self._worker.status()

    async def set_role(self, role: Role) -> WorkerStatus:
        """Switches the role from within the cluster; operators go through a router, which keeps the last of its kind."""
        await self.ready()
        assert self._worker is not None
        return self._worker.set_role(role)

    async def set_draining(self, is_draining: bool) -> WorkerStatus:
        """Has the worker take no new work, or take it again; as with roles, operators go through a router."""
        await self.ready()
        assert self._worker is not None
        return self._worker.set_draining(is_draining)

    async def leave(self) -> bool:
        """Lets the worker's requests move away or end, within its own bound; False when some are still there."""
        return self._worker is None or not self._started.done() or await self._worker.leave()

    async def group_address(self) -> tuple[str, int]:
        """Host and port where this worker's further ranks find it; waits until it listens."""
        return await asyncio.shield(self._group_address)

    async def stop(self) -> None:
        """Leaves the cluster, then ends the worker; the process stays for Ray to end."""
        registrar, worker = self._registrar, self._worker
        await self._end(*([registrar.withdraw()] if registrar else []), *([worker.stop()] if worker else []))
        await self._send_last_traces()

    async def _run(self) -> None:
        make = await asyncio.to_thread(_import_worker, bool(self._secret)) if self._factory is None else self._factory
        self._export_traces(self._config.otlp_endpoint, "baton-worker")
        store = open_store(self._store_config, self._namespace)
        start = await _insist(lambda: number_start(store, self._name, self._clock.now_s()))
        role = await _insist(lambda: desired_role(store, self._name, self._role))
        self._tls.check_host(self._config.host)
        more: dict[str, Any] = {"plan": self._plan_group()} if self._secret else {}
        if credentials := credentials_of(self._tls, parties.worker(self._name)):
            more["credentials"] = credentials
        worker = make(self._config, self._name, start, role, self._on_role_change, **more)
        self._worker = worker
        is_draining = await _insist(lambda: desired_draining(store, self._name))
        telling = asyncio.create_task(tell_loading(store, self._name, role, loading))
        try:
            address = await worker.start()
        finally:
            telling.cancel()
        if is_draining:
            worker.set_draining(True)
        worker.watch_draining(self._on_drain_change)
        registrar = Registrar(
            store, Registration(address, role), self._role, start, self._store_config.lease_ttl_s, is_draining
        )
        self._registrar = registrar
        await _insist(registrar.register)
        self._started.set_result(address.target)
        telling = asyncio.create_task(self._tell_ray(worker))
        try:
            await registrar.run()  # not in a group, which would wrap Superseded
        finally:
            telling.cancel()

    async def _tell_ray(self, worker: WorkerLike) -> None:
        async def read() -> Reading:
            return worker_reading(worker.status())

        await keep_told(lambda: RayGauges("worker_id", self._name, WORKER_GAUGES), read)

    def _plan_group(self) -> GroupPlan:
        """Rank 0 listens where the other ranks' nodes reach it, and ends processes that are of no use any more."""
        from cluster.actors.ranks import REJOIN_GRACE_S, end_rank

        def on_listening(address: tuple[str, int]) -> None:
            self._loop.call_soon_threadsafe(self._group_address.set_result, address)

        def on_lost(rank: RankStatus, reason: str) -> None:
            log.warning("%s lost rank %d: %s", self._name, rank.rank, reason)
            self._loop.call_later(REJOIN_GRACE_S, end_unless_back, rank)

        def end_unless_back(rank: RankStatus) -> None:
            known = self._worker.status().ranks if self._worker is not None and self._started.done() else ()
            if not any(now.pid == rank.pid and now.rank == rank.rank and now.is_alive for now in known):
                threading.Thread(target=end_rank, args=(rank,), name="end-rank", daemon=True).start()

        return GroupPlan(own_address(), self._secret, on_listening, on_lost)

    def _on_role_change(self, role: Role, generation: int) -> None:
        """Called by the worker on a thread of its own."""
        self._loop.call_soon_threadsafe(self._change_role, role, generation)

    def _change_role(self, role: Role, generation: int) -> None:
        if self._registrar is not None:
            self._registrar.change_role(role, generation)

    def _on_drain_change(self, is_draining: bool) -> None:
        """Called by the worker on its event loop."""
        self._loop.call_soon_threadsafe(self._change_draining, is_draining)

    def _change_draining(self, is_draining: bool) -> None:
        if self._registrar is not None:
            self._registrar.change_draining(is_draining)


class RouterActor(Actor):
    """One router, told of every change of membership, and with it a role controller (cluster.roles). After a crash it is back on the same port.

    With `held_ports` (see cluster.actors.held_ports) its port stays open meanwhile.
    """

    vital_thread = ("router-",)

    def __init__(
        self,
        router_id: str,
        config: RouterConfig,
        store: StoreConfig,
        namespace: str,
        tls: TlsConfig,
        roles: RolesConfig,
        held_ports: str = "",
        log_config: LogConfig | None = None,
    ) -> None:
        self._tls = tls
        self._roles_config = roles
        self._roles: Any = None
        self._config, self._store_config, self._namespace = config, store, namespace
        self._held_ports = held_ports
        self._router: Any = None
        self._store: Store | None = None
        self._announcing: asyncio.Task[None] | None = None
        super().__init__(router_id, log_config)

    def __repr__(self) -> str:
        """What Ray's dashboard shows of it: also where the operator's page is, where that is known before it listens."""
        if not self._config.port:
            return self._name
        scheme = "https" if self._config.cert_file else "http"
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"{self._name} {scheme}://{host}:{self._config.port}/admin/ui"

    async def status(self) -> Any:
        """The router's RouterStatus."""
        await self.ready()
        return await asyncio.to_thread(self._router.status)

    async def until_ready(self) -> None:
        """Waits until it serves and knows a worker that decodes."""
        await self.ready()
        await self._router.until_ready()

    async def stop(self) -> None:
        """Takes no more requests, lets those that run finish and ends the router; the process stays for Ray to end."""
        self._stopping = True
        if self._announcing is not None and self._store is not None:
            self._announcing.cancel()
            with suppress(StoreUnavailable):
                await self._store.delete(ROUTERS + self._name)
            await self._roles.resign()
        # Requests that run on may need to know of workers that come and go: the membership is followed to the end.
        if self._router is not None:
            with suppress(Exception):
                await self._router.stop()
        await self._send_last_traces()
        self._life.cancel()

    async def _run(self) -> None:
        make = await asyncio.to_thread(_import_router)
        self._export_traces(self._config.otlp_endpoint, "baton-router")
        fetch = importlib.import_module("cluster.actors.held_ports").fetch
        self._store = open_store(self._store_config, self._namespace)
        listener = await asyncio.to_thread(fetch, self._held_ports, self._name) if self._held_ports else None
        credentials = credentials_of(self._tls, parties.router(self._name))
        make_roles = await asyncio.to_thread(lambda: importlib.import_module("cluster.roles.driver").RolesDriver)
        roles = make_roles(self._roles_config, self._config, self._name, self._store_config.lease_ttl_s)
        store = self._store
        tenants = TenantsDriver(self._config.tenants, store)
        secret = await _insist(lambda: salt_secret(store, self._store_config))
        router = make(self._config, self._name, credentials, listener, roles, tenants, secret)
        self._router, self._roles = router, roles
        await _insist(lambda: tenants.prepare(router))
        url = await router.start()
        self._started.set_result(url)
        async with asyncio.TaskGroup() as tasks:
            version = importlib.import_module("router.api.health").product_version()
            listed = ListedRouter(self._name, url, socket.gethostname(), version, time.time())
            self._announcing = tasks.create_task(keep_listed(store, listed, self._store_config.lease_ttl_s))
            tasks.create_task(self._follow(self._store, router))
            tasks.create_task(self._follow_loading(self._store, router))
            tasks.create_task(self._follow_routers(self._store, router))
            tasks.create_task(roles.run(self._store, router))
            tasks.create_task(tenants.run(router))
            if is_in_ray():
                tasks.create_task(self._tell_ray())

    async def _tell_ray(self) -> None:
        async def read() -> Reading:
            return router_reading(await asyncio.to_thread(self._router.status))

        await keep_told(lambda: RayGauges("router_id", self._name, ROUTER_GAUGES), read)

    async def _follow_loading(self, store: Store, router: Any) -> None:
        async with aclosing(follow_loading(store)) as changes:
            async for workers in changes:
                router.set_loading(workers)

    async def _follow_routers(self, store: Store, router: Any) -> None:
        async with aclosing(follow_routers(store)) as changes:
            async for routers in changes:
                router.set_routers(routers)

    async def _follow(self, store: Store, router: Any) -> None:
        """Feeds the router with the membership: after each change in the store, and when a grace period ends."""
        lease_ttl_s = self._store_config.lease_ttl_s
        known: dict[str, Registration] = {}
        async with aclosing(follow_members(store, lease_ttl_s, DOUBT_LEASES * lease_ttl_s)) as changes:
            async for workers in changes:
                before, known = known, {worker.address.worker_id: worker for worker in workers}
                log.info("%s; there are %d workers now", changes_between(before, known), len(known))
                router.set_workers(tuple(worker.address for worker in workers))


def changes_between(before: dict[str, Registration], after: dict[str, Registration]) -> str:
    """What has changed, in a line that is as long as that: `decode-1 came, decode-2 left`."""
    came = [f"{name} came" for name in after if name not in before]
    left = [f"{name} left" for name in before if name not in after]
    changed = [f"{name} is new" for name, worker in after.items() if name in before and before[name] != worker]
    return ", ".join([*came, *left, *changed]) or "nothing has changed"


async def _insist(attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Repeats what the store's absence defeats, for up to a minute; a starting cluster's Redis may be slower than we."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            return await attempt()
        except StoreUnavailable:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(0.5)


def leave_for_good() -> None:
    """Ends this actor without a restart, which would only push the newer one out in turn."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _import_worker(is_group: bool) -> WorkerFactory:
    """On a thread, as it loads torch: the actor answers meanwhile."""
    module = importlib.import_module("workers.group_worker" if is_group else "workers.worker")
    factory: WorkerFactory = module.GroupWorker if is_group else module.Worker
    return factory


def _import_router() -> Callable[..., Any]:
    factory: Callable[..., Any] = importlib.import_module("router.server").RouterServer
    return factory
