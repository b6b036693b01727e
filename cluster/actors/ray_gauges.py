"""What Ray's own views show of workers and routers: gauges at the metrics port of each node of Ray. Knows no Ray but for its metrics.

Only what says how things stand: latencies are histograms of the routers' own /metrics, as Ray's histograms keep no exact sums.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from router.backend import RouterStatus
from workers.status import Role, WorkerStatus, switches_of

log = logging.getLogger(__name__)

EVERY_S = 2.0
"""Between two readings. Ray itself collects them at its own pace (10 s)."""

WORKER_GAUGES: Mapping[str, str] = {
    "baton_worker_role": "1 for the role that the worker has, 0 for the others",
    "baton_worker_draining": "1: takes no new work",
    "baton_worker_num_running": "sequences that run there",
    "baton_worker_num_waiting": "requests that wait there",
    "baton_worker_num_transferring": "handoffs under way",
    "baton_worker_kv_used_ratio": "share of the KV pool's blocks that is neither free nor evictable",
    "baton_worker_switches": "role switches and lost ranks since the process was started",
}
ROUTER_GAUGES: Mapping[str, str] = {
    "baton_router_num_running": "requests that generate",
    "baton_router_num_waiting": "requests that wait for a worker in this router",
    "baton_router_num_workers": "workers that are connected",
    "baton_router_num_workers_lost": "members without a stream",
}
ROLE = "baton_worker_role"
Reading = Mapping[tuple[str, str], float]
"""Values by gauge and, where the gauge has one, role; otherwise that is empty."""


class Gauge(Protocol):
    """As ray.util.metrics.Gauge."""

    def set(self, value: float, tags: dict[str, str] | None = None) -> None: ...


def worker_reading(status: WorkerStatus) -> Reading:
    """What the gauges of one worker say."""
    load = status.load
    used = (load.num_blocks - load.num_free_blocks) / load.num_blocks if load.num_blocks else 0.0
    values = {
        "baton_worker_draining": status.is_draining,
        "baton_worker_num_running": load.num_running,
        "baton_worker_num_waiting": load.num_waiting,
        "baton_worker_num_transferring": load.num_transferring,
        "baton_worker_kv_used_ratio": used,
        "baton_worker_switches": switches_of(status.generation),
    }
    roles = {(ROLE, role.value): float(role is status.role) for role in Role}
    return roles | {(name, ""): float(value) for name, value in values.items()}


def router_reading(status: RouterStatus) -> Reading:
    """What the gauges of one router say."""
    connected = sum(view.connected for view in status.workers)
    values = {
        "baton_router_num_running": status.num_running,
        "baton_router_num_waiting": status.num_waiting,
        "baton_router_num_workers": connected,
        "baton_router_num_workers_lost": len(status.workers) - connected,
    }
    return {(name, ""): float(value) for name, value in values.items()}


class RayGauges:
    """The gauges of this process, by name. `kind` is the tag that names whose they are: worker_id or router_id."""

    def __init__(
        self, kind: str, name: str, gauges: Mapping[str, str], make: Callable[..., Gauge] | None = None
    ) -> None:
        make = make or ray_gauge
        self._own = {kind: name}
        self._gauges = {
            gauge: make(gauge, description=text, tag_keys=(kind, "role") if gauge == ROLE else (kind,))
            for gauge, text in gauges.items()
        }

    def tell(self, reading: Reading) -> None:
        for (gauge, role), value in reading.items():
            self._gauges[gauge].set(value, tags={**self._own, "role": role} if role else self._own)


def ray_gauge(*args: Any, **named: Any) -> Gauge:
    made: Gauge = importlib.import_module("ray.util.metrics").Gauge(*args, **named)
    return made


def is_in_ray() -> bool:
    """Whether this process is one of Ray's; a router may do without (`baton router --without-ray`)."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


async def keep_told(make: Callable[[], RayGauges], read: Callable[[], Awaitable[Reading]]) -> None:
    """Until cancelled. A reading that fails is left out, as are gauges that Ray does not make: nobody's request depends on them."""
    gauges: RayGauges | None = None
    while True:
        try:
            gauges = gauges or make()
            gauges.tell(await read())
        except Exception as error:
            log.debug("Ray was not told of the load: %s", error)
        await asyncio.sleep(EVERY_S)
