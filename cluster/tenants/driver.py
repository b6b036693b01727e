"""Keeps one router informed of tenants and keys, from their file and the store, and fetches for it from the common allowances."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cluster.store.store import Snapshot, Store
from cluster.tenants.file import TenantsFile, read_tenants
from cluster.tenants.records import KEYS, decode_key, encode_key
from router.tenants.buckets import Ask, Given
from router.tenants.config import TenantLimits, TenantsConfig
from router.tenants.roster import Key
from workers.errors import InvalidConfig

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_S = 2.0
"""Between two looks at the file."""


class Informed(Protocol):
    """A router."""

    def set_tenants(self, tenants: Mapping[str, TenantLimits], keys: Sequence[Key]) -> None: ...


class TenantsDriver:
    """A TenantDesk. Made and run on the loop of the store's client."""

    def __init__(self, config: TenantsConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._file = TenantsFile({}, ())
        self._seen: tuple[int, int] | None = None
        """Of the file: when it was changed, and its size."""
        self._keys: tuple[Key, ...] = ()
        self.refused: frozenset[str] = frozenset()
        """Keys of entries in the store that are no tenants' keys."""

    # ---- the router's part, from its own loop ----

    async def ask(self, asks: Sequence[Ask]) -> Sequence[Given]:
        return await self._here(self._store.ask(asks))

    async def put_key(self, key: Key) -> None:
        await self._here(self._store.put(KEYS + key.key_id, encode_key(key)))

    async def _here(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    # ---- life ----

    async def prepare(self, router: Informed) -> None:
        """Tells the router what there is before it serves. Raises InvalidConfig for a file that cannot be used, StoreUnavailable."""
        if not self._config.is_on:
            return
        if self._config.file:
            self._read_file()
        self._take_keys(await self._store.list(KEYS))
        self._tell(router)

    async def run(self, router: Informed) -> None:
        """Until cancelled; where there are no tenants it only waits for that."""
        if not self._config.is_on:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_store(router))
            if self._config.file:
                tasks.create_task(self._follow_file(router))

    async def _follow_store(self, router: Informed) -> None:
        async with aclosing(self._store.watch(KEYS)) as snapshots:
            async for snapshot in snapshots:
                self._take_keys(snapshot)
                self._tell(router)

    async def _follow_file(self, router: Informed) -> None:
        """A file that has become wrong changes nothing, and is named once."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if await asyncio.to_thread(self._stamp) != self._seen and await asyncio.to_thread(self._read_file):
                    self._tell(router)
                    log.info("%s has changed; it names %d tenants now", self._config.file, len(self._file.tenants))
            except InvalidConfig as error:
                log.error("the tenants stay as they were: %s", error)

    def _read_file(self) -> bool:
        """Whether there is another file than before."""
        self._seen = self._stamp()
        before = self._file
        self._file = read_tenants(Path(self._config.file), self._config.max_tenants)
        return self._file != before

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = Path(self._config.file).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def _take_keys(self, snapshot: Snapshot) -> None:
        found = [(entry, decode_key(entry)) for entry in snapshot.entries]
        before, self.refused = self.refused, frozenset(entry.key for entry, key in found if key is None)
        for name in sorted(self.refused - before):
            log.warning("the store's entry %.100r is no key of a tenant and does not count", name)
        self._keys = tuple(key for _, key in found if key is not None)

    def _tell(self, router: Informed) -> None:
        keys = (*self._file.keys, *self._keys)
        if len(keys) > self._config.max_keys:
            log.warning("there are %d keys; only router.tenants.max_keys = %d count", len(keys), self._config.max_keys)
        router.set_tenants(self._file.tenants, keys)
