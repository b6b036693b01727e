"""What a worker should be: the role and the draining that the store remembers, else what it was started with."""

from __future__ import annotations

from cluster.membership.membership import DRAINS, ROLES
from cluster.store.store import Store
from workers.errors import InvalidConfig
from workers.status import Role


def resolve_role(configured: Role, remembered: str | None) -> Role:
    """A remembered role wins; one that this version does not know is as good as none."""
    if remembered is not None and remembered in {role.value for role in Role}:
        return Role(remembered)
    return configured


async def desired_role(store: Store, worker_id: str, configured: Role) -> Role:
    """The role that a worker must start in, so that a restart does not undo a switch."""
    entry = await store.get(ROLES + worker_id)
    return resolve_role(configured, entry.value if entry else None)


async def remember_role(store: Store, worker_id: str, role: Role, configured: Role) -> None:
    """Makes `role` the one that the worker comes back in; only a role that differs from the configured one is kept."""
    entry = await store.get(ROLES + worker_id)
    if role is configured:
        if entry is not None:
            await store.delete(entry.key, entry.version)
    elif entry is None or entry.value != role.value:
        await store.put(ROLES + worker_id, role.value)


async def forget_role(store: Store, worker_id: str) -> None:
    """Undoes earlier switches: the worker's next start takes its configured role."""
    await store.delete(ROLES + worker_id)


async def desired_draining(store: Store, worker_id: str) -> bool:
    """Whether a worker must start without taking work, so that a restart does not undo a drain."""
    return await store.get(DRAINS + worker_id) is not None


async def remember_draining(store: Store, worker_id: str, is_draining: bool) -> None:
    """Makes it what the worker comes back as."""
    if is_draining:
        await store.put(DRAINS + worker_id, "true")
    else:
        await store.delete(DRAINS + worker_id)


async def forget_draining(store: Store, worker_id: str) -> None:
    """The worker's next start takes work."""
    await store.delete(DRAINS + worker_id)


def check_roles(num_prefill: int, num_decode: int, num_mixed: int) -> None:
    """Raises InvalidConfig unless the pools together can serve a request."""
    if num_prefill + num_mixed == 0:
        raise InvalidConfig("no worker could prefill: set pools.prefill or pools.mixed to at least 1")
    if num_decode + num_mixed == 0:
        raise InvalidConfig("no worker could decode: set pools.decode or pools.mixed to at least 1")
