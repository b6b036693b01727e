"""Opens the store that a cluster is configured with, from any process of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from cluster.secret_files import read_secret
from cluster.store.signed import SignedStore
from cluster.store.store import Store, StoreConfig, StoreUnavailable

log = logging.getLogger(__name__)

MIN_SECRET = 16


def open_store(config: StoreConfig, namespace: str, say: Callable[[str], None] = log.warning) -> Store:
    """Redis, or the actor that hosts the store of the connected Ray cluster. `say` hears of entries that do not count.

    Raises StoreUnavailable when there is no such actor, InvalidConfig when a file with a secret cannot be used.
    """
    if config.url != "memory":
        from cluster.store.redis_store import RedisStore

        redis = RedisStore(config.url, config.cluster, options=redis_options(config))
        return SignedStore(redis, cluster_secret(config), say)
    import ray

    from cluster.store.actor_store import STORE_HOST_NAME, ActorStore

    try:
        # Ray's token guards this one.
        return ActorStore(ray.get_actor(STORE_HOST_NAME, namespace=namespace))
    except ValueError as error:
        raise StoreUnavailable(
            f"the Ray cluster has no actor {STORE_HOST_NAME!r} in namespace {namespace!r}; "
            "start the cluster with `baton serve` or `baton router` first, or name a Redis with --store"
        ) from error


def cluster_secret(config: StoreConfig) -> str:
    """What this cluster's entries in Redis are signed with."""
    return read_secret(config.secret_file, "store.secret_file", MIN_SECRET)


def redis_options(config: StoreConfig) -> dict[str, Any]:
    """What redis.asyncio.Redis is made with beside the URL: who asks, and whom it trusts."""
    options: dict[str, Any] = {}
    if config.password_file:
        from cluster.store.redis_access import FileCredentials

        read_secret(config.password_file, "store.password_file")
        options["credential_provider"] = FileCredentials(config.username, config.password_file)
    if config.ca_file:
        options["ssl_ca_certs"] = config.ca_file
    if config.cert_file:
        options |= {"ssl_certfile": config.cert_file, "ssl_keyfile": config.key_file}
    return options
