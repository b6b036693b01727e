"""Keeps one worker registered: a lease in the store renewed by heartbeat, its desired role and its start count beside it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from cluster.membership import STARTS, Registration, Superseded
from cluster.roles import remember_draining, remember_role
from cluster.store.store import ABSENT, Store, StoreUnavailable
from workers.status import Role, WorkerAddress

log = logging.getLogger(__name__)


class Registrar:
    """Owns a worker's entries in the store from its start to its end; one event loop.

    The store may be away: the worker serves on, and registers again when the store is back.
    """

    def __init__(
        self,
        store: Store,
        registration: Registration,
        configured: Role,
        start_count: int,
        ttl_s: float,
        is_draining: bool = False,
    ) -> None:
        self._store = store
        self._registration = registration
        self._configured = configured
        self._start_count = start_count
        self._ttl_s = ttl_s
        self._is_draining = is_draining
        self._version = ABSENT
        self._changed = asyncio.Event()

    @property
    def registration(self) -> Registration:
        return self._registration

    def change_role(self, role: Role, generation: int) -> None:
        """The worker switched: `run` writes the new role and generation at once."""
        address = self._registration.address
        self._registration = Registration(WorkerAddress(address.worker_id, generation, address.target), role)
        self._version = ABSENT
        self._changed.set()

    def change_draining(self, is_draining: bool) -> None:
        """The worker drains, or takes work again: `run` writes it at once."""
        self._is_draining = is_draining
        self._version = ABSENT
        self._changed.set()

    async def register(self) -> None:
        """Writes desired role and draining, start count and registration. Raises Superseded, StoreUnavailable.

        The registration comes last: whoever sees it may count on the rest, even if this worker dies at once.
        """
        registration, is_draining = self._registration, self._is_draining
        address = registration.address
        while True:
            current = await self._store.get(registration.key)
            known = Registration.decode(current.value) if current else None
            if known is not None and known.address.generation > address.generation:
                raise Superseded(f"{address.worker_id} has registered as generation {known.address.generation}")
            await remember_role(self._store, address.worker_id, registration.role, self._configured)
            await remember_draining(self._store, address.worker_id, is_draining)
            await self._keep_start_count(STARTS + address.worker_id)
            written = await self._store.compare_and_set(
                registration.key, current.version if current else ABSENT, registration.encode(), self._ttl_s
            )
            if written is not None:
                break
        if registration is self._registration and is_draining is self._is_draining:
            self._version = written

    async def run(self) -> None:
        """Renews the lease until cancelled. Raises Superseded when a newer start of this worker has registered."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._ttl_s / 3):
                    await self._changed.wait()
            self._changed.clear()
            try:
                registration = self._registration
                if not await self._store.renew(registration.key, self._version, self._ttl_s):
                    await self.register()
                    log.info("registered %s", registration)
            except StoreUnavailable as error:
                log.warning("cannot renew the lease of %s: %s", self._registration.key, error)

    async def withdraw(self) -> None:
        """Gives the lease up, unless a newer start holds it; the desired role stays."""
        with suppress(StoreUnavailable):
            current = await self._store.get(self._registration.key)
            known = Registration.decode(current.value) if current else None
            if current is not None and known is not None and known.address == self._registration.address:
                await self._store.delete(current.key, current.version)

    async def _keep_start_count(self, key: str) -> None:
        """A store that lost its memory must not give this worker's next start a lower generation."""
        while True:
            current = await self._store.get(key)
            if current is not None and int(current.value) >= self._start_count:
                return
            version = current.version if current else ABSENT
            if await self._store.compare_and_set(key, version, str(self._start_count)) is not None:
                return


async def count_start(store: Store, worker_id: str) -> int:
    """The number of this start of the worker, from 1; no two starts get the same one."""
    return await store.increment(STARTS + worker_id)
