"""Removes everything that a cluster has left in Redis: Baton's entries, and the tables of a Ray that kept them there."""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from cluster.store.open import redis_options
from cluster.store.redis_store import keyspace
from cluster.store.store import StoreConfig, StoreUnavailable
from workers.errors import InvalidConfig

TIMEOUT_S = 60.0
_AT_ONCE = 500


async def clear(config: StoreConfig, ray_tables: str) -> int:
    """Deletes the cluster's keys, and those of Ray named `ray_tables`; returns how many there were.

    Raises InvalidConfig without a Redis, StoreUnavailable when it does not answer within TIMEOUT_S.
    """
    if config.url == "memory":
        raise InvalidConfig("the store is in memory: nothing outlives the cluster; name a Redis with --store")
    client: Any = redis.asyncio.Redis.from_url(config.url, **redis_options(config), socket_connect_timeout=5.0)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await _delete(client, f"{_literal(keyspace(config.cluster))}*") + await _delete_ray(
                config, ray_tables
            )
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable(f"Redis did not let its keys be deleted: {error}") from error
    finally:
        await client.aclose()


async def _delete_ray(config: StoreConfig, ray_tables: str) -> int:
    """Ray uses database 0 whatever database the URL names."""
    client: Any = redis.asyncio.Redis.from_url(config.url, **redis_options(config), socket_connect_timeout=5.0)
    try:
        client.connection_pool.connection_kwargs["db"] = 0
        return await _delete(client, f"RAY{_literal(ray_tables)}@*")
    finally:
        await client.aclose()


async def _delete(client: Any, pattern: str) -> int:
    found = 0
    keys: list[bytes] = []
    async for key in client.scan_iter(match=pattern, count=_AT_ONCE):
        keys.append(key)
        if len(keys) >= _AT_ONCE:
            found += await client.delete(*keys)
            keys.clear()
    return found + (await client.delete(*keys) if keys else 0)


def _literal(text: str) -> str:
    """The text itself in a pattern of Redis."""
    return "".join(f"\\{letter}" if letter in "*?[]\\" else letter for letter in text)
