"""The operator's page at /admin/ui, and what it is told every second: workers, pools and load, without what a page has no use for."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response

from router.api.middleware import Draining
from router.api.objectives import ANSWERS_WITHOUT_FAULT, FIRST_TOKEN_S, FIRST_TOKENS_IN_TIME
from router.api.problems import rejected
from router.api.services import Services
from router.api.sse import event, to_json
from router.backend import ListedRouter, Lookout, RouterStatus, WorkerView
from router.requests.journal import AGES_S, Way

EVERY_S = 1.0
MAX_VIEWERS = 8
"""Pages that are told at once; each costs a router with 1,000 workers some 300 KB a second."""
MAX_RANKS = 500
"""That a page is told of one by one."""
STREAM = "text/event-stream"


def desk_routes() -> APIRouter:
    """The page holds no data: who opens it without a key sees a field for the key."""
    routes = APIRouter()
    page = Path(__file__).with_name("desk.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

    @routes.get("/admin/ui", response_model=None)
    async def ui() -> Response:
        return Response(page, headers={**headers, "cache-control": "no-cache"}, media_type="text/html")

    return routes


class Desk:
    """Tells pages what this router knows, until it is about to end. One event loop."""

    def __init__(self, services: Services, draining: Draining) -> None:
        self._services = services
        self._draining = draining
        self._num_viewers = 0

    def open(self) -> AsyncIterator[bytes]:
        """Events for one page. Raises Rejected when MAX_VIEWERS are told already."""
        if self._num_viewers >= MAX_VIEWERS:
            raise rejected(429, "too_many_viewers", f"{MAX_VIEWERS} pages are told at once; close one")
        return self._events()

    async def _events(self) -> AsyncIterator[bytes]:
        self._num_viewers += 1
        try:
            while not self._draining.has_begun:
                backend = self._services.backend
                view = desk_view(backend.status(), backend.lookout(), self._services.metrics.attainment())
                yield event((await asyncio.to_thread(to_json, view)).encode())
                await asyncio.sleep(EVERY_S)
        finally:
            self._num_viewers -= 1


def desk_view(status: RouterStatus, lookout: Lookout, attained: Mapping[str, float]) -> dict[str, Any]:
    """What one event holds."""
    return {
        "router_id": status.router_id,
        "num_running": status.num_running,
        "num_waiting": status.num_waiting,
        "routers": _routers(status),
        "counters": dict(status.counters),
        "workers": [_worker(view) for view in status.workers],
        "ranks": list(islice(chain(_ranks(status, is_alive=False), _ranks(status, is_alive=True)), MAX_RANKS)),
        "loading": [
            {"worker_id": each.worker_id, "role": each.role.value, **each.progress._asdict()} for each in status.loading
        ],
        "in_flight": {
            "ages_s": AGES_S,
            "counts": lookout.ages,
            "oldest": [way_view(way, lookout.now_s) for way in lookout.oldest],
        },
        "faults": [
            {
                "ago_s": round(lookout.now_s - fault.at_s, 1),
                "what": fault.what,
                "worker_id": fault.worker_id,
                "is_recovery": fault.is_recovery,
            }
            for fault in lookout.faults
        ],
        "objectives": {
            "first_token_s": FIRST_TOKEN_S,
            "wanted": {"in_time": FIRST_TOKENS_IN_TIME, "without_fault": ANSWERS_WITHOUT_FAULT},
            "counts": dict(attained),
        },
    }


def _routers(status: RouterStatus) -> list[dict[str, Any]]:
    """This one too, where it is on no list. Only of itself it knows what it does."""
    listed = status.routers
    if all(router.router_id != status.router_id for router in listed):
        listed = (ListedRouter(status.router_id), *listed)
    own = {"num_running": status.num_running, "num_waiting": status.num_waiting}
    return [dataclasses.asdict(router) | (own if router.router_id == status.router_id else {}) for router in listed]


def _ranks(status: RouterStatus, is_alive: bool) -> Iterator[dict[str, Any]]:
    """Of workers that are several processes."""
    for view in status.workers:
        for rank in view.status.ranks:
            if rank.is_alive is is_alive:
                yield {"worker_id": view.status.worker_id, **dataclasses.asdict(rank)}


def way_view(way: Way, now: float, has_steps: bool = False) -> dict[str, Any]:
    """A request's way, with times as seconds ago."""
    view = dataclasses.asdict(way)
    del view["arrived_s"], view["steps"]
    view["age_s"] = round(now - way.arrived_s, 2)
    if has_steps:
        view["steps"] = [
            {
                "after_s": round(step.at_s - way.arrived_s, 4),
                "what": step.what,
                "worker_id": step.worker_id,
                "why": step.why,
            }
            for step in way.steps
        ]
    return view


def _worker(view: WorkerView) -> dict[str, Any]:
    status = view.status
    return {
        "worker_id": status.worker_id,
        "generation": str(status.generation),  # more digits than a JavaScript number holds
        "role": status.role.value,
        "connected": view.connected,
        "is_draining": status.is_draining,
        "is_rebuilding": status.is_rebuilding,
        "frame_age_s": round(view.frame_age_s, 2),
        "num_requests": view.num_requests,
        "speed": round(view.speed, 3),
        "max_num_seqs": status.max_num_seqs,
        "load": status.load._asdict(),
        "ranks": len(status.ranks),
        "ranks_alive": sum(rank.is_alive for rank in status.ranks),
    }
