"""RedisStore: the store of a cluster that spans hosts; each write is one Lua script, so it happens whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import NoScriptError, RedisError

from cluster.store.store import ABSENT, Entry, Snapshot, StoreUnavailable, check_entry

# KEYS of every script: the entry, the index of names, the revision, the epoch. An entry is a hash of value and version.
# The index is a sorted set (all scores 0, so ordered by name); it may name entries whose lease has ended.
_WRITE = """
local current = redis.call('HGET', KEYS[1], 'version') or '0'
if ARGV[4] ~= '' and current ~= ARGV[4] then return 0 end
local version = redis.call('INCR', KEYS[3])
redis.call('HSET', KEYS[1], 'value', ARGV[2], 'version', version)
if ARGV[3] ~= '' then redis.call('PEXPIRE', KEYS[1], ARGV[3]) else redis.call('PERSIST', KEYS[1]) end
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('PUBLISH', ARGV[5], ARGV[1])
return version
"""
_RENEW = """
if (redis.call('HGET', KEYS[1], 'version') or '0') ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_DELETE = """
local current = redis.call('HGET', KEYS[1], 'version')
if not current or (ARGV[2] ~= '' and current ~= ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('PUBLISH', ARGV[3], ARGV[1])
return 1
"""
# ARGV: the key of an entry without its name, first and last name, a candidate epoch.
_LIST = """
redis.call('SET', KEYS[4], ARGV[4], 'NX')
local found = {redis.call('GET', KEYS[4])}
for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[2], ARGV[2], ARGV[3])) do
  local entry = redis.call('HMGET', ARGV[1] .. name, 'value', 'version')
  if entry[1] then
    found[#found + 1] = name
    found[#found + 1] = entry[1]
    found[#found + 1] = entry[2]
    found[#found + 1] = tostring(redis.call('PTTL', ARGV[1] .. name))
  else
    redis.call('ZREM', KEYS[2], name)
  end
end
return found
"""


class RedisStore:
    """One Redis may serve several clusters: each has its keyspace `baton:{cluster}:`, in one slot of a Redis Cluster."""

    def __init__(self, url: str, cluster: str, timeout_s: float = 5.0) -> None:
        self._url = url
        self._space = f"baton:{{{cluster}}}:"
        self._channel = f"{self._space}changes"
        self._timeout_s = timeout_s
        self._client: Any = redis.asyncio.Redis.from_url(
            url,
            decode_responses=True,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            health_check_interval=10,
        )
        self._scripts = {text: self._client.register_script(text) for text in (_WRITE, _RENEW, _DELETE, _LIST)}

    async def check(self) -> None:
        """Raises StoreUnavailable unless Redis answers."""
        with self._errors():
            await self._client.ping()

    async def get(self, key: str) -> Entry | None:
        check_entry(key)
        with self._errors():
            value, version = await self._client.hmget(self._entry_key(key), ["value", "version"])
        return Entry(key, value, int(version)) if value is not None and version is not None else None

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
        """Sleeps on pub/sub and, for leases that just end, until the first of them would: no poll, no server setting."""
        known: Snapshot | None = None
        while True:
            try:
                async with self._subscription() as messages:
                    while True:
                        snapshot, expiry_s = await self._list(prefix)
                        if snapshot != known:
                            known = snapshot
                            yield snapshot
                        await self._next_change(messages, prefix, expiry_s)
            except (RedisError, OSError, StoreUnavailable):
                await asyncio.sleep(0.5)

    async def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._client.aclose()

    async def _write(self, key: str, value: str, ttl_s: float | None, expected: str) -> int:
        check_entry(key, value, ttl_s)
        ttl_ms = "" if ttl_s is None else _milliseconds(ttl_s)
        return int(await self._run(_WRITE, key, key, value, ttl_ms, expected, self._channel))

    async def _list(self, prefix: str) -> tuple[Snapshot, float]:
        """The entries and the seconds until the first lease among them ends."""
        first, last = (f"[{prefix}", f"[{prefix}\U0010ffff") if prefix else ("-", "+")
        arguments = (self._entry_key(""), first, last, uuid.uuid4().hex)
        epoch, *fields = await self._run(_LIST, "", *arguments)
        rows = [fields[at : at + 4] for at in range(0, len(fields), 4)]
        leases_ms = [float(row[3]) for row in rows if float(row[3]) >= 0]
        entries = tuple(Entry(name, value, int(version)) for name, value, version, _ in rows)
        return Snapshot(epoch, entries), min(leases_ms, default=math.inf) / 1e3

    async def _next_change(self, messages: Any, prefix: str, expiry_s: float) -> None:
        """Returns at a change under the prefix, or when a lease may have ended."""
        # One millisecond more: PTTL rounds, and an entry is gone only after its last millisecond.
        deadline = time.monotonic() + expiry_s + 0.001
        while (left_s := deadline - time.monotonic()) > 0:
            # Wakes at least every five seconds to let the client's health check notice a dead connection.
            message = await messages.get_message(ignore_subscribe_messages=True, timeout=min(left_s, 5.0))
            if message is not None and str(message["data"]).startswith(prefix):
                return

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
