"""Keeps one worker registered: a lease in the store renewed by heartbeat, its desired role and the number of its start beside it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from cluster.membership.membership import (
    STARTS,
    WORKERS,
    Membership,
    Registration,
    Superseded,
    Tick,
    remember_draining,
    remember_role,
)
from cluster.store.store import ABSENT, Entry, Store, StoreUnavailable
from workers.errors import InvalidConfig
from workers.status import Role, WorkerAddress

log = logging.getLogger(__name__)

MAX_START = 2**32 - 1
"""A start's number is the upper half of a generation."""


class Registrar:
    """Owns a worker's entries in the store from its start to its end; one event loop.

    The store may be away: the worker serves on, and registers again when the store is back.
    """

    def __init__(
        self,
        store: Store,
        registration: Registration,
        configured: Role,
        start: int,
        ttl_s: float,
        is_draining: bool = False,
    ) -> None:
        self._store = store
        self._registration = registration
        self._configured = configured
        self._start = start
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
        """Writes desired role and draining, the number of the start and the registration. Raises Superseded, StoreUnavailable.

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
            await keep_start(self._store, address.worker_id, self._start)
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


async def number_start(store: Store, worker_id: str, now_s: float) -> int:
    """The number of this start of the worker, which every earlier one is below; no two starts get the same one.

    It is the time in seconds since 1970, `now_s`, unless the store knows of a start that is not below that. So a store that has
    lost its memory, as one that died together with the worker, gives no number twice either: only a clock that was set back
    as well could.
    """
    while True:
        current = await store.get(STARTS + worker_id)
        number = max(int(now_s), _start_of(current) + 1)
        if number > MAX_START:
            raise InvalidConfig(
                f"the store counts {current.value if current else now_s} starts of {worker_id}; delete {STARTS}{worker_id}"
            )
        if (
            await store.compare_and_set(STARTS + worker_id, current.version if current else ABSENT, str(number))
            is not None
        ):
            return number


def _start_of(entry: Entry | None) -> int:
    """0 without an entry, or with one that holds no number."""
    text = entry.value if entry else ""
    return int(text) if len(text) <= 20 and text.isascii() and text.isdigit() else 0


async def keep_start(store: Store, worker_id: str, number: int) -> None:
    """A store that has lost its memory learns the number of a start again; a later one is left alone."""
    while True:
        current = await store.get(STARTS + worker_id)
        if current is not None and _start_of(current) >= number:
            return
        if (
            await store.compare_and_set(STARTS + worker_id, current.version if current else ABSENT, str(number))
            is not None
        ):
            return


async def follow_members(
    store: Store, grace_s: float, doubt_s: float = 0.0
) -> AsyncGenerator[tuple[Registration, ...], None]:
    """Yields the members at once, then after each change: of the store, or by a grace period that ends. Never ends itself."""
    membership = Membership(grace_s, doubt_s)
    known: frozenset[str] = frozenset()
    async with aclosing(store.watch(WORKERS)) as snapshots:
        upcoming = asyncio.ensure_future(anext(snapshots))
        try:
            membership.handle(await upcoming, time.monotonic())
            known = _name_refused(membership.refused, known)
            upcoming = asyncio.ensure_future(anext(snapshots))
            yield membership.workers
            while True:
                wait_s = None if membership.deadline is None else max(0.0, membership.deadline - time.monotonic())
                done, _ = await asyncio.wait({upcoming}, timeout=wait_s)
                event = upcoming.result() if done else Tick()
                if done:
                    upcoming = asyncio.ensure_future(anext(snapshots))
                is_changed = membership.handle(event, time.monotonic()) is not None
                known = _name_refused(membership.refused, known)
                if is_changed:
                    yield membership.workers
        finally:
            upcoming.cancel()
            with suppress(asyncio.CancelledError):
                await upcoming


def _name_refused(refused: frozenset[str], known: frozenset[str]) -> frozenset[str]:
    """Logs those that are new; returns what is to be known next time."""
    for key in sorted(refused - known):
        log.warning("the store's entry %.100r is no registration of a worker and does not count", key)
    return refused
