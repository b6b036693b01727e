"""Routers of one cluster hear of the same tenants and keys: from a file that changes, and from the store."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.store.memory import MemoryStore
from cluster.store.store import StoreConfig
from cluster.tenants.driver import TenantsDriver
from cluster.tenants.records import KEYS, salt_secret
from router.tenants.config import TenantLimits, TenantsConfig
from router.tenants.roster import Key
from router.tenants.tenancy import Caller, Tenancy
from workers.errors import InvalidConfig, Refused

BOUND_S = 60.0


class Router:
    """A Tenancy that a driver informs, and what it was told last."""

    def __init__(self, config: TenantsConfig, store: MemoryStore) -> None:
        self.driver = TenantsDriver(config, store)
        self.tenancy = Tenancy(config, desk=self.driver)
        self.told = asyncio.Event()

    def set_tenants(self, tenants: Mapping[str, TenantLimits], keys: Sequence[Key]) -> None:
        self.tenancy.set_roster(tenants, keys)
        self.told.set()

    def caller(self, key: str) -> Caller | Key | None:
        return self.tenancy.caller(hashlib.sha256(key.encode()).digest())


async def told(router: Router, key: str, kind: type) -> Caller | Key | None:
    """When the key is known as that."""
    async with asyncio.timeout(BOUND_S):
        while not isinstance(found := router.caller(key), kind):
            router.told.clear()
            await router.told.wait()
    return found


async def test_every_router_hears_of_a_new_key_of_a_revoked_one_and_of_a_changed_file(tmp_path: Path) -> None:
    store, file = MemoryStore(), tmp_path / "tenants.yaml"
    file.write_text("tenants: {acme: {requests_per_min: 5, keys: [{key: inside}]}}")
    config = TenantsConfig(file=str(file))
    routers = [Router(config, store) for _ in range(2)]
    await store.put(KEYS + "broken", "no key")
    for router in routers:
        await router.driver.prepare(router)
    running = [asyncio.create_task(router.driver.run(router)) for router in routers]
    inside = routers[0].caller("inside")
    assert isinstance(inside, Caller) and (inside.tenant, inside.limits.requests_per_min) == ("acme", 5)
    key = Key("k1", "acme", hashlib.sha256(b"made").digest(), is_stored=True)
    first, second = routers
    # The desk is asked from another loop, as a router's thread does.
    await asyncio.to_thread(lambda: asyncio.run(first.tenancy.put_key(key)))
    made = await told(second, "made", Caller)
    assert isinstance(made, Caller) and made.key_id == "k1" and made.limits.requests_per_min == 5
    entry = await store.get(KEYS + "k1")
    assert entry is not None and "made" not in entry.value
    revoked = Key("k1", "acme", key.digest, revoked_s=1.0, is_stored=True)
    await asyncio.to_thread(lambda: asyncio.run(second.tenancy.put_key(revoked)))
    await told(first, "made", Key)

    file.write_text("tenants: {acme: {requests_per_min: no}}")
    os.utime(file, ns=(1, 1))
    file.write_text("tenants: {other: {weight: 2, keys: [{key: later}]}}")
    later = await told(first, "later", Caller)
    assert isinstance(later, Caller) and later.limits.weight == 2.0
    assert first.caller("inside") is None
    for task in running:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_file_that_cannot_be_used_stops_a_start_and_keys_need_tenants(tmp_path: Path) -> None:
    store = MemoryStore()
    router = Router(TenantsConfig(file=str(tmp_path / "none.yaml")), store)
    with pytest.raises(InvalidConfig, match="cannot read"):
        await router.driver.prepare(router)
    with pytest.raises(Refused, match=r"router\.tenants\.enabled"):
        await Tenancy(TenantsConfig(), desk=router.driver).put_key(Key("k", "t", b"x"))
    with pytest.raises(Refused, match="without a store"):
        await Tenancy(TenantsConfig(enabled=True)).put_key(Key("k", "t", b"x"))


async def test_all_routers_make_salts_with_one_secret(tmp_path: Path) -> None:
    store, config = MemoryStore(), StoreConfig()
    secrets = await asyncio.gather(*(salt_secret(store, config) for _ in range(5)))
    assert len(set(secrets)) == 1 and len(secrets[0]) == 64
    path = tmp_path / "secret"
    path.write_text("the cluster's own secret")
    path.chmod(0o600)
    redis = StoreConfig(url="redis://127.0.0.1:1/0", secret_file=str(path))
    assert await salt_secret(store, redis) == await salt_secret(MemoryStore(), redis) != secrets[0]
