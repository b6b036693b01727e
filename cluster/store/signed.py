"""SignedStore: a store in which only those who know the cluster's secret can write anything that counts.

Each value carries an HMAC of its key and itself, so nobody who can merely write to the store (Redis) can name a worker, a role
or the number of a start, nor move an entry to another key. Entries that are not ours are as if they were not there: skipped,
counted, and named once each. What the cluster itself has written before can be written again by whoever has read it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from cluster.store.store import ABSENT, Entry, Snapshot, Store
from router.tenants.buckets import Ask, Given

log = logging.getLogger(__name__)

MAX_NAMED = 1000
"""Keys that are named; of further ones only the number is kept."""
_MAC_CHARACTERS = 64


class SignedStore:
    """Over any Store; `say` hears a sentence for each key whose entry is refused."""

    def __init__(self, store: Store, secret: str, say: Callable[[str], None] = log.warning) -> None:
        self._store = store
        self._secret = secret.encode()
        self._say = say
        self._named: set[str] = set()
        self.num_refused = 0
        """Entries that were read and did not count."""

    async def get(self, key: str) -> Entry | None:
        entry = await self._store.get(key)
        return self._opened(entry) if entry else None

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> int:
        return await self._store.put(key, self._sealed(key, value), ttl_s)

    async def compare_and_set(self, key: str, version: int, value: str, ttl_s: float | None = None) -> int | None:
        sealed = self._sealed(key, value)
        written = await self._store.compare_and_set(key, version, sealed, ttl_s)
        if written is None and version == ABSENT:
            # An entry that does not count is in the way of none that does.
            current = await self._store.get(key)
            if current is not None and self._opened(current) is None:
                written = await self._store.compare_and_set(key, current.version, sealed, ttl_s)
        return written

    async def renew(self, key: str, version: int, ttl_s: float) -> bool:
        return await self._store.renew(key, version, ttl_s)

    async def delete(self, key: str, version: int | None = None) -> bool:
        return await self._store.delete(key, version)

    async def list(self, prefix: str) -> Snapshot:
        return self._of_ours(await self._store.list(prefix))

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(self._store.watch(prefix)) as snapshots:
            async for snapshot in snapshots:
                yield self._of_ours(snapshot)

    async def ask(self, asks: Sequence[Ask]) -> tuple[Given, ...]:
        """Not signed: who writes to the store can give tenants more, or less."""
        return await self._store.ask(asks)

    async def close(self) -> None:
        await self._store.close()

    def _of_ours(self, snapshot: Snapshot) -> Snapshot:
        entries = tuple(opened for entry in snapshot.entries if (opened := self._opened(entry)) is not None)
        return Snapshot(snapshot.epoch, entries)

    def _sealed(self, key: str, value: str) -> str:
        return self._mac(key, value) + value

    def _opened(self, entry: Entry) -> Entry | None:
        mac, value = entry.value[:_MAC_CHARACTERS], entry.value[_MAC_CHARACTERS:]
        if hmac.compare_digest(mac.encode(), self._mac(entry.key, value).encode()):
            return Entry(entry.key, value, entry.version)
        self.num_refused += 1
        if entry.key not in self._named and len(self._named) < MAX_NAMED:
            self._named.add(entry.key)
            self._say(
                f"the store's entry {entry.key[:100]!r} was not written with this cluster's secret (store.secret_file) "
                "and does not count"
            )
        return None

    def _mac(self, key: str, value: str) -> str:
        text = key.encode(errors="surrogatepass") + b"\0" + value.encode(errors="surrogatepass")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()
