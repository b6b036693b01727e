"""A new cluster begins without the switches, pins and orders of an earlier one on the same store; the audit stays."""

from __future__ import annotations

from cluster.roles.records import ORDERS, PINS, SWITCHES
from cluster.store.store import Store


async def forget_switches(store: Store, worker_id: str) -> None:
    """Whatever was under way for a worker of that name is over."""
    for prefix in (SWITCHES, PINS, ORDERS):
        await store.delete(prefix + worker_id)
