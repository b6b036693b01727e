"""The Ray actor of a router: starts it and feeds it with members, roles and tenants. No token passes here."""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any

from cluster.actors.process import Actor, insist
from cluster.actors.ray_gauges import ROUTER_GAUGES, RayGauges, Reading, is_in_ray, keep_told, router_reading
from cluster.config import LogConfig
from cluster.membership.loading import follow_loading
from cluster.membership.membership import DOUBT_LEASES, Registration
from cluster.membership.registration import follow_members
from cluster.membership.routers import ROUTERS, follow_routers, keep_listed
from cluster.roles.config import RolesConfig
from cluster.store.open import open_store
from cluster.store.store import Store, StoreConfig, StoreUnavailable
from cluster.tenants.driver import TenantsDriver
from cluster.tenants.records import salt_secret
from router.backend import ListedRouter
from router.config import RouterConfig
from workers.machine.collector import leave_what_is_there
from workers.trust import parties
from workers.trust.config import TlsConfig
from workers.trust.credentials import credentials_of

log = logging.getLogger(__name__)


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
        secret = await insist(lambda: salt_secret(store, self._store_config))
        router = make(self._config, self._name, credentials, listener, roles, tenants, secret)
        self._router, self._roles = router, roles
        await insist(lambda: tenants.prepare(router))
        url = await router.start()
        leave_what_is_there()
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


def _import_router() -> Callable[..., Any]:
    factory: Callable[..., Any] = importlib.import_module("router.server").RouterServer
    return factory
