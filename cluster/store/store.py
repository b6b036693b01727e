"""The store's contract: a small key-value space with leases, compare-and-set and a watch; knows nothing of what is kept in it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol
from urllib.parse import urlsplit

from annotated_types import Ge, Le

from router.tenants.buckets import Ask, Given
from workers.errors import BatonError, InvalidConfig

MAX_KEY_BYTES = 512
MAX_VALUE_BYTES = 64 * 1024
ABSENT = 0
"""The version of a key that does not exist, for compare_and_set."""


class StoreUnavailable(BatonError):
    """The world's fault: the store did not answer. What it held may be there again later."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value. `version` is new with every write to the store, never reused, and positive."""

    key: str
    value: str
    version: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All entries under a prefix at one instant, by key.

    `epoch` names the store's life: it changes when a store comes back empty, so "everything is gone" can be told from
    "everybody left".
    """

    epoch: str
    entries: tuple[Entry, ...]


SETTLE_S = 0.1
"""A watcher that was told of a change hears of what follows within this time at once, not one by one."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What has become different under a prefix since a watcher last heard, which was before `revision`.

    `is_whole`: these are all entries, whatever the watcher knew.
    """

    epoch: str
    revision: int
    entries: tuple[Entry, ...]
    removed: tuple[str, ...] = ()
    is_whole: bool = False


class Mirror:
    """A watcher's copy of the entries under a prefix, kept up by Changes."""

    def __init__(self) -> None:
        self.epoch = ""
        self.revision = 0
        self.entries: dict[str, Entry] = {}

    def apply(self, changes: Changes) -> bool:
        """True when the copy is another one now."""
        before = dict(self.entries) if changes.is_whole else None
        is_new = changes.epoch != self.epoch
        self.epoch, self.revision = changes.epoch, changes.revision
        if before is not None:
            self.entries = {entry.key: entry for entry in changes.entries}
            return is_new or self.entries != before
        for entry in changes.entries:
            is_new |= self.entries.get(entry.key) != entry
            self.entries[entry.key] = entry
        for key in changes.removed:
            is_new |= self.entries.pop(key, None) is not None
        return is_new

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.epoch, tuple(self.entries[key] for key in sorted(self.entries)))


class Store(Protocol):
    """What must outlive a process. Every method may raise StoreUnavailable; nothing a token waits for calls one."""

    async def get(self, key: str) -> Entry | None: ...

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> int:
        """Writes and returns the new version. With `ttl_s` the entry is a lease: gone unless renewed; without, it stays."""
        ...

    async def compare_and_set(self, key: str, version: int, value: str, ttl_s: float | None = None) -> int | None:
        """Writes if the entry still has `version` (ABSENT: if there is none) and returns the new version, else None."""
        ...

    async def renew(self, key: str, version: int, ttl_s: float) -> bool:
        """Prolongs a lease without a new version or a wake-up of watchers; False when another write or expiry came between."""
        ...

    async def delete(self, key: str, version: int | None = None) -> bool:
        """Removes the entry (with `version`: only that one); False when there was nothing to remove."""
        ...

    async def list(self, prefix: str) -> Snapshot: ...

    def watch(self, prefix: str) -> AsyncGenerator[Snapshot, None]:
        """Yields the state under a prefix now and after each change; quick changes may come as one.

        Outages are waited out: the state is yielded again once the store answers. Never ends by itself; `aclose` it.
        """
        ...

    async def ask(self, asks: Sequence[Ask]) -> tuple[Given, ...]:
        """Takes from allowances that all share, all in one step; see router.tenants.buckets.Buckets, which says what comes of it. They
        are no entries: no watcher hears of them, and a store that comes back empty has full ones."""
        ...

    async def close(self) -> None: ...


def check_entry(key: str, value: str = "", ttl_s: float | None = None) -> None:
    """Refuses what no store keeps. Raises ValueError: keys and values come from our own code."""
    if not key or len(key.encode()) > MAX_KEY_BYTES or "\x00" in key:
        raise ValueError(f"a store key has 1 to {MAX_KEY_BYTES} bytes; this one is {key[:80]!r}")
    if len(value.encode()) > MAX_VALUE_BYTES:
        raise ValueError(f"the value of {key!r} exceeds {MAX_VALUE_BYTES} bytes")
    if ttl_s is not None and ttl_s <= 0:
        raise ValueError(f"the lease of {key!r} must last longer than 0 s; it is {ttl_s}")


def has_credentials(url: str) -> bool:
    """Whether the URL holds a user's name or a password, which a command line must not."""
    parts = urlsplit(url)
    return "@" in parts.netloc or "password=" in parts.query


def check_store_url(url: str) -> None:
    """Raises InvalidConfig unless `url` is "memory" or names a Redis."""
    if url != "memory" and not url.startswith(("redis://", "rediss://", "unix://")):
        raise InvalidConfig(
            f"store.url must be memory, redis://HOST:PORT/DB, rediss://... or unix:///PATH; it begins with {url[:7]!r}"
        )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where leases, desired roles and generations live."""

    url: str = field(default="memory", repr=False)
    """"memory": in an actor of this cluster (`store`); redis://HOST:PORT/DB: in Redis, shared between hosts."""
    username: str = ""
    """Redis user; empty: the default one."""
    password_file: str = ""
    """Holds the password of Redis; only the user of Baton may read it. A password in the URL belongs in the environment or a file."""
    ca_file: str = ""
    """Certificates (PEM) that a rediss:// server is checked with; empty: the system's."""
    cert_file: str = ""
    """This client's own certificate (PEM), where Redis asks for one."""
    key_file: str = ""
    """The key of cert_file."""
    secret_file: str = ""
    """Holds the secret that the cluster's entries in Redis are signed with, the same on every host. Empty: `baton serve` makes one,
    which `baton worker` and `baton router` of the same user find on the same host."""
    cluster: str = "baton"
    """Prefix of the keys in Redis; two clusters on one Redis need two names."""
    lease_ttl_s: Annotated[float, Ge(0.5), Le(300)] = 4.0
    """A worker that has not renewed its lease for this long is taken out; it renews three times as often."""

    def __post_init__(self) -> None:
        check_store_url(self.url)
        if (self.ca_file or self.cert_file) and not self.url.startswith("rediss://"):
            raise InvalidConfig("store.ca_file and store.cert_file are for a store.url that begins with rediss://")
        if bool(self.cert_file) != bool(self.key_file):
            raise InvalidConfig("store.cert_file and store.key_file belong together: set both or neither")
        if self.username and not self.password_file:
            raise InvalidConfig("store.username needs store.password_file, or both belong in store.url")
        if self.password_file and has_credentials(self.url):
            raise InvalidConfig("store.url names a user or a password, and so does store.password_file: keep one")
        if not self.cluster or not set(self.cluster) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
        ):
            raise InvalidConfig(f"store.cluster takes letters, digits, '-', '_' and '.'; it is {self.cluster!r}")
