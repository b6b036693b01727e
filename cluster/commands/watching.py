"""Tells the operator of a running cluster what becomes of its workers, from their registrations."""

from __future__ import annotations

from contextlib import aclosing

from cluster.config import ClusterConfig
from cluster.console.progress import Progress
from cluster.console.status_table import generation_text
from cluster.membership.following import follow_members
from cluster.membership.membership import Registration
from cluster.store.open import open_store
from workers.machine.limits import memory_kills


async def tell_changes(config: ClusterConfig, progress: Progress, only: str | None = None) -> None:
    """One line for each worker (or only that one) that goes, comes back or changes its role; until cancelled."""
    store = open_store(config.store, config.ray.namespace, progress.say)
    known: dict[str, Registration] | None = None
    kills = memory_kills()
    async with aclosing(follow_members(store, config.store.lease_ttl_s)) as changes:
        async for workers in changes:
            now = {worker.address.worker_id: worker for worker in workers}
            before = now if known is None else known
            for worker_id in sorted(now.keys() | before.keys()):
                line = describe(worker_id, before.get(worker_id), now.get(worker_id))
                if line and only in (None, worker_id):
                    progress.say(line)
            known = now
            if (killed_now := memory_kills()) > kills:
                progress.say(
                    "the kernel has ended a process here for want of memory; lower worker.kv_memory_bytes, or start fewer workers"
                )
                kills = killed_now


def describe(worker_id: str, before: Registration | None, after: Registration | None) -> str:
    """What became of a worker; empty when nothing did."""
    if after is None:
        return f"{worker_id} is gone"
    generation = generation_text(after.address.generation)
    if before is None:
        return f"{worker_id} is there: {after.role}, generation {generation}"
    if before.role != after.role:
        return f"{worker_id} switched from {before.role} to {after.role}, generation {generation}"
    if before.address != after.address:
        return f"{worker_id} was started again: {after.role}, generation {generation}"
    return ""
