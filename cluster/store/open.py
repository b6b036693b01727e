"""Opens the store that a cluster is configured with, from any process of it."""

from __future__ import annotations

from cluster.store.store import Store, StoreConfig, StoreUnavailable


def open_store(config: StoreConfig, namespace: str) -> Store:
    """Redis, or the actor that hosts the store of the connected Ray cluster. Raises StoreUnavailable when there is no such actor."""
    if config.url != "memory":
        from cluster.store.redis_store import RedisStore

        return RedisStore(config.url, config.cluster)
    import ray

    from cluster.store.actor_store import STORE_HOST_NAME, ActorStore

    try:
        return ActorStore(ray.get_actor(STORE_HOST_NAME, namespace=namespace))
    except ValueError as error:
        raise StoreUnavailable(
            f"the Ray cluster has no actor {STORE_HOST_NAME!r} in namespace {namespace!r}; "
            "start the cluster with `baton serve` or `baton router` first, or name a Redis with --store"
        ) from error
