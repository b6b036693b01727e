"""RedisStore: the store of a cluster that spans hosts; each write is one Lua script, so it happens whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import NoScriptError, RedisError

from cluster.store.redis_buckets import ASK, arguments_of
from cluster.store.store import (
    ABSENT,
    MAX_VALUE_BYTES,
    SETTLE_S,
    Changes,
    Entry,
    Mirror,
    Snapshot,
    StoreUnavailable,
    check_entry,
)
from router.tenants.buckets import Ask, Given

MAX_ENTRIES = 16384
"""Entries under a prefix that are read; a cluster has a few a worker."""

# KEYS of every script: the entry, the index of names, the revision, the epoch. An entry is a hash of value and version.
# The index is a sorted set (all scores 0, so ordered by name); it may name entries whose lease has ended.
# Others may write to the same Redis: an entry that is no hash, has no number as its version or too long a value counts as absent,
# and keys of another type than ours are replaced by the next write, which needs them. A revision that is gone goes on from the
# time, so that no version comes twice. A lease's length stands beside its value: Redis ends it by the time of day, so one whose
# clock was set back would keep it for longer, and whoever reads it shortens it again.
_COMMON = f"""
local function kind(key) return redis.call('TYPE', key).ok end
local function version_of(key)
  if kind(key) ~= 'hash' then return nil end
  local version = redis.call('HGET', key, 'version')
  if not version or #version > 16 or not string.match(version, '^[1-9]%d*$') then return nil end
  if redis.call('HSTRLEN', key, 'value') > {MAX_VALUE_BYTES} then return nil end
  if redis.call('HEXISTS', key, 'value') == 0 then return nil end
  return version
end
local function epoch()
  if kind(KEYS[4]) ~= 'string' or redis.call('STRLEN', KEYS[4]) > 64 then return '' end
  return redis.call('GET', KEYS[4])
end
local function left_of(key)
  local left, whole = redis.call('PTTL', key), tonumber(redis.call('HGET', key, 'ttl_ms') or '')
  if not whole or not (whole >= 1 and whole < left) then return left end
  redis.call('PEXPIRE', key, math.floor(whole))
  return math.floor(whole)
end
"""
_WRITE = (
    _COMMON
    + """
local current = version_of(KEYS[1])
if ARGV[4] ~= '' and (current or '0') ~= ARGV[4] then return 0 end
if not current then redis.call('DEL', KEYS[1]) end
local kinds = {[2] = 'zset', [3] = 'string'}
for at = 2, 3 do
  local found = kind(KEYS[at])
  if found ~= kinds[at] and found ~= 'none' then redis.call('DEL', KEYS[at]) end
end
local last = redis.call('GET', KEYS[3])
if not last or not string.match(last, '^%d+$') or #last > 16 or #last == 16 and last > '8' then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[3], now[1] .. string.format('%06d', tonumber(now[2])))
end
local version = redis.call('INCR', KEYS[3])
redis.call('HSET', KEYS[1], 'value', ARGV[2], 'version', version)
if ARGV[3] ~= '' then
  redis.call('HSET', KEYS[1], 'ttl_ms', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
else
  redis.call('HDEL', KEYS[1], 'ttl_ms')
  redis.call('PERSIST', KEYS[1])
end
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('PUBLISH', ARGV[5], ARGV[1])
return version
"""
)
# A Redis that is full takes PEXPIRE, but refuses HSET: the length is written only where it is another one.
_RENEW = (
    _COMMON
    + """
if version_of(KEYS[1]) ~= ARGV[1] then return 0 end
local renewed = redis.call('PEXPIRE', KEYS[1], ARGV[2])
if redis.call('HGET', KEYS[1], 'ttl_ms') ~= ARGV[2] then redis.call('HSET', KEYS[1], 'ttl_ms', ARGV[2]) end
return renewed
"""
)
_DELETE = (
    _COMMON
    + """
local current = version_of(KEYS[1])
if ARGV[2] ~= '' and (current or '0') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
if kind(KEYS[2]) == 'zset' then redis.call('ZREM', KEYS[2], ARGV[1]) end
redis.call('PUBLISH', ARGV[3], ARGV[1])
return current and 1 or 0
"""
)
# ARGV: the key of an entry without its name, then names with the versions that are known of them ("": none).
_LOOK = (
    _COMMON
    + """
local found = {epoch()}
for at = 2, #ARGV, 2 do
  local key = ARGV[1] .. ARGV[at]
  local version = version_of(key)
  found[#found + 1] = version or ''
  found[#found + 1] = tostring(version and left_of(key) or -2)
  found[#found + 1] = version and version ~= ARGV[at + 1] and redis.call('HGET', key, 'value') or ''
end
return found
"""
)
# ARGV: the key of an entry without its name, first and last name, a candidate epoch, the most entries.
_LIST = (
    _COMMON
    + """
if epoch() == '' then redis.call('SET', KEYS[4], ARGV[4]) end
local found = {epoch()}
if kind(KEYS[2]) ~= 'zset' then return found end
for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[2], ARGV[2], ARGV[3], 'LIMIT', 0, ARGV[5])) do
  local key = ARGV[1] .. name
  local version = version_of(key)
  if version then
    found[#found + 1] = name
    found[#found + 1] = redis.call('HGET', key, 'value')
    found[#found + 1] = version
    found[#found + 1] = tostring(left_of(key))
  else
    redis.call('ZREM', KEYS[2], name)
  end
end
return found
"""
)


MAX_LOOK = 256
"""Entries that a watcher looks at by name in one go; more, and it lists everything."""
SOON_S = 0.5
"""Leases that would end within this time are looked at together."""
LIST_AGAIN_S = 60.0
"""A watcher lists everything this often, whatever it was told."""
_ROUNDING_S = 0.001
"""PTTL rounds, and an entry is gone only after its last millisecond."""


def keyspace(cluster: str) -> str:
    """What a cluster's keys begin with."""
    return f"baton:{{{cluster}}}:"


class RedisStore:
    """One Redis may serve several clusters: each has its keyspace `baton:{cluster}:`, in one slot of a Redis Cluster."""

    def __init__(
        self, url: str, cluster: str, timeout_s: float = 5.0, options: Mapping[str, Any] | None = None
    ) -> None:
        self._url = url
        self._space = keyspace(cluster)
        self._channel = f"{self._space}changes"
        self._timeout_s = timeout_s
        self._client: Any = redis.asyncio.Redis.from_url(
            url,
            **(options or {}),
            decode_responses=True,
            encoding_errors="replace",  # others may write anything
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            health_check_interval=10,
        )
        self._scripts = {
            text: self._client.register_script(text) for text in (_WRITE, _RENEW, _DELETE, _LOOK, _LIST, ASK)
        }

    async def check(self) -> None:
        """Raises StoreUnavailable unless Redis answers."""
        with self._errors():
            await self._client.ping()

    async def get(self, key: str) -> Entry | None:
        check_entry(key)
        with self._errors():
            _, version, _, value = await self._run(_LOOK, "", self._entry_key(""), key, "")
        return Entry(key, value, int(version)) if version else None

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> int:
        return await self._write(key, value, ttl_s, "")

    async def compare_and_set(self, key: str, version: int, value: str, ttl_s: float | None = None) -> int | None:
        written = await self._write(key, value, ttl_s, str(version))
        return written if written != ABSENT else None

    async def renew(self, key: str, version: int, ttl_s: float) -> bool:
        check_entry(key, ttl_s=ttl_s)
        return bool(await self._run(_RENEW, key, str(version), _milliseconds(ttl_s)))

    async def delete(self, key: str, version: int | None = None) -> bool:
        check_entry(key)
        return bool(await self._run(_DELETE, key, key, "" if version is None else str(version), self._channel))

    async def list(self, prefix: str) -> Snapshot:
        snapshot, _ = await self._list(prefix)
        return snapshot

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot, None]:
        """Sleeps on pub/sub, whose messages name what has changed, and looks at that alone: no poll, no server setting.

        A lease that just ends tells nobody, so each is looked at when it would, together with those that would soon.
        Everything is listed at the start, after an outage or very many changes, and every LIST_AGAIN_S.
        """
        mirror = Mirror()
        while True:
            try:
                async with self._subscription() as messages:
                    ends_s: dict[str, float] = {}
                    names: set[str] | None = None
                    while True:
                        if names is None:
                            again_s = time.monotonic() + LIST_AGAIN_S
                            changes = await self._list_again(prefix, ends_s)
                        else:
                            changes = await self._look(names, mirror, ends_s)
                        if mirror.apply(changes):
                            yield mirror.snapshot
                            await asyncio.sleep(SETTLE_S)
                        names = await self._next_names(messages, prefix, ends_s, again_s)
            except (RedisError, OSError, StoreUnavailable):
                await asyncio.sleep(0.5)

    async def ask(self, asks: Sequence[Ask]) -> tuple[Given, ...]:
        found = await self._run(
            ASK, "", f"{self._space}bucket:", *(text for each in asks for text in arguments_of(each))
        )
        return tuple([Given(float(found[at]), float(found[at + 1])) for at in range(0, len(found), 2)])

    async def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._client.aclose()

    async def _write(self, key: str, value: str, ttl_s: float | None, expected: str) -> int:
        check_entry(key, value, ttl_s)
        ttl_ms = "" if ttl_s is None else _milliseconds(ttl_s)
        return int(await self._run(_WRITE, key, key, value, ttl_ms, expected, self._channel))

    async def _list(self, prefix: str) -> tuple[Snapshot, dict[str, float]]:
        """The entries, and of those that are leases the seconds until they end."""
        first, last = (f"[{prefix}", f"[{prefix}\U0010ffff") if prefix else ("-", "+")
        arguments = (self._entry_key(""), first, last, uuid.uuid4().hex, str(MAX_ENTRIES))
        epoch, *fields = await self._run(_LIST, "", *arguments)
        rows = [fields[at : at + 4] for at in range(0, len(fields), 4)]
        left_s = {name: float(ttl_ms) / 1e3 for name, _, _, ttl_ms in rows if float(ttl_ms) >= 0}
        return Snapshot(epoch, tuple(Entry(name, value, int(version)) for name, value, version, _ in rows)), left_s

    async def _list_again(self, prefix: str, ends_s: dict[str, float]) -> Changes:
        snapshot, left_s = await self._list(prefix)
        ends_s.clear()
        ends_s.update({name: time.monotonic() + left + _ROUNDING_S for name, left in left_s.items()})
        return Changes(snapshot.epoch, 0, snapshot.entries, is_whole=True)

    async def _look(self, names: set[str], mirror: Mirror, ends_s: dict[str, float]) -> Changes:
        """What has become of these entries; values come only with versions that are not known."""
        asked = [(name, str(mirror.entries[name].version) if name in mirror.entries else "") for name in sorted(names)]
        epoch, *fields = await self._run(_LOOK, "", self._entry_key(""), *(text for pair in asked for text in pair))
        entries, removed = [], []
        for (name, known), at in zip(asked, range(0, len(fields), 3), strict=True):
            version, ttl_ms, value = fields[at : at + 3]
            ends_s.pop(name, None)
            if not version:
                removed.append(name)
                continue
            if version != known:
                entries.append(Entry(name, value, int(version)))
            if float(ttl_ms) >= 0:
                ends_s[name] = time.monotonic() + float(ttl_ms) / 1e3 + _ROUNDING_S
        if epoch != mirror.epoch:  # emptied under a connection that stayed
            raise StoreUnavailable(f"Redis at {self._shown_url()} has lost its memory")
        return Changes(epoch, 0, tuple(entries), tuple(removed))

    async def _next_names(
        self, messages: Any, prefix: str, ends_s: dict[str, float], again_s: float
    ) -> set[str] | None:
        """What to look at next: entries that were changed, or leases that may have ended. None: at everything."""
        wake_s = min((again_s, *ends_s.values()))
        names: set[str] = set()
        while not names and (left_s := wake_s - time.monotonic()) > 0:
            # Wakes at least every five seconds to let the client's health check notice a dead connection.
            name = await self._heard(messages, min(left_s, 5.0))
            names |= {name} if name and name.startswith(prefix) else set()
        while len(names) <= MAX_LOOK and (name := await self._heard(messages, 0.0)) is not None:
            names |= {name} if name.startswith(prefix) else set()
        now_s = time.monotonic()
        if min(ends_s.values(), default=now_s + 1) <= now_s:
            names |= {name for name, end_s in ends_s.items() if end_s <= now_s + SOON_S}
        return None if now_s >= again_s or len(names) > MAX_LOOK else names

    @staticmethod
    async def _heard(messages: Any, timeout_s: float) -> str | None:
        """The name that the next message tells of; None when none comes in time."""
        message = await messages.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
        return None if message is None else str(message["data"])

    @contextlib.asynccontextmanager
    async def _subscription(self) -> AsyncIterator[Any]:
        async with self._client.pubsub() as messages:
            await messages.subscribe(self._channel)
            # Only a confirmed subscription sees every change after the listing that follows.
            if await messages.get_message(timeout=self._timeout_s) is None:
                raise StoreUnavailable(f"Redis at {self._shown_url()} did not confirm a subscription")
            yield messages

    async def _run(self, script: str, key: str, *arguments: str) -> Any:
        keys: Sequence[str] = (
            self._entry_key(key),
            f"{self._space}names",
            f"{self._space}revision",
            f"{self._space}epoch",
        )
        with self._errors():
            return await self._scripts[script](keys=keys, args=arguments)

    def _entry_key(self, key: str) -> str:
        return f"{self._space}entry:{key}"

    def _shown_url(self) -> str:
        """The URL without credentials."""
        scheme, _, rest = self._url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except NoScriptError as error:  # register_script loads a missing script itself: twice missing is no cache miss
            raise StoreUnavailable(f"Redis at {self._shown_url()} keeps no scripts: {error}") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"Redis at {self._shown_url()} does not answer: {error}") from error


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1e3)))
