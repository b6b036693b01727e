"""The Ray actor of a worker: starts it, keeps it registered, tells it of wishes and Ray of its load. No token passes here."""

from __future__ import annotations

import asyncio
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from cluster.actors.process import Actor, insist
from cluster.actors.ray_gauges import WORKER_GAUGES, RayGauges, Reading, keep_told, worker_reading
from cluster.config import LogConfig
from cluster.membership.loading import tell_loading
from cluster.membership.membership import Registration, desired_draining, desired_role
from cluster.membership.registration import Registrar, number_start
from cluster.membership.steady_time import SteadyTime
from cluster.ray_session.defaults import own_address
from cluster.store.open import open_store
from cluster.store.store import StoreConfig
from workers.config import WorkerConfig
from workers.group.watch import GroupPlan
from workers.machine.collector import leave_what_is_there
from workers.model.checkpoint.progress import loading
from workers.status import LoadProgress, RankStatus, Role, WorkerAddress, WorkerStatus
from workers.trust import parties
from workers.trust.config import TlsConfig
from workers.trust.credentials import credentials_of

log = logging.getLogger(__name__)


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
        start = await insist(lambda: number_start(store, self._name, self._clock.now_s()))
        role = await insist(lambda: desired_role(store, self._name, self._role))
        self._tls.check_host(self._config.host)
        more: dict[str, Any] = {"plan": self._plan_group()} if self._secret else {}
        if credentials := credentials_of(self._tls, parties.worker(self._name)):
            more["credentials"] = credentials
        worker = make(self._config, self._name, start, role, self._on_role_change, **more)
        self._worker = worker
        is_draining = await insist(lambda: desired_draining(store, self._name))
        telling = asyncio.create_task(tell_loading(store, self._name, role, loading))
        try:
            address = await worker.start()
        finally:
            telling.cancel()
        leave_what_is_there()
        if is_draining:
            worker.set_draining(True)
        worker.watch_draining(self._on_drain_change)
        registrar = Registrar(
            store, Registration(address, role), self._role, start, self._store_config.lease_ttl_s, is_draining
        )
        self._registrar = registrar
        await insist(registrar.register)
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


def _import_worker(is_group: bool) -> WorkerFactory:
    """On a thread, as it loads torch: the actor answers meanwhile."""
    module = importlib.import_module("workers.group_worker" if is_group else "workers.worker")
    factory: WorkerFactory = module.GroupWorker if is_group else module.Worker
    return factory
