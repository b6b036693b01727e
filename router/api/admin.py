"""/admin: the router's state, what decides on roles, switching a worker's role while it serves, draining and pinning it."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from router.api.admin_schema import DrainBody, PinBody, RoleBody
from router.api.desk import STREAM, Desk, way_view
from router.api.middleware import Draining
from router.api.problems import rejected
from router.api.schema import parse_body
from router.api.services import Services
from router.api.sse import to_json
from router.backend import RouterStatus
from workers.errors import InvalidRequest
from workers.status import Role, WorkerStatus


def admin_routes(services: Services, draining: Draining) -> APIRouter:
    routes = APIRouter()
    desk = Desk(services, draining)

    @routes.get("/admin/status", response_model=None)
    async def status(http: HttpRequest) -> Response:
        """Once; with `Accept: text/event-stream` again and again, in short, for the page at /admin/ui."""
        if http.headers.get("accept", "").strip() == STREAM:
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            return StreamingResponse(desk.open(), headers=headers, media_type=STREAM)
        return Response(to_json(_router_status(services.backend.status())), media_type="application/json")

    def check_worker(worker_id: str) -> None:
        if worker_id not in {view.status.worker_id for view in services.backend.status().workers}:
            raise rejected(404, "worker_not_found", f"there is no worker {worker_id!r:.200}", "worker_id")

    @routes.post("/admin/workers/{worker_id}/drain", response_model=None)
    async def drain(worker_id: str, http: HttpRequest) -> Response:
        async with services.bodies.receive(http) as raw:
            body = parse_body(DrainBody, raw)
        check_worker(worker_id)
        drained = await services.backend.set_draining(worker_id, body.drain, bool(body.force))
        return Response(to_json(_worker_status(drained)), media_type="application/json")

    @routes.post("/admin/workers/{worker_id}/role", response_model=None)
    async def set_role(worker_id: str, http: HttpRequest) -> Response:
        async with services.bodies.receive(http) as raw:
            body = parse_body(RoleBody, raw)
        if body.role not in set(Role):
            raise InvalidRequest(f"role must be one of {', '.join(Role)}", "role")
        check_worker(worker_id)
        switched = await services.backend.set_role(worker_id, Role(body.role), bool(body.force), body.pin)
        return Response(to_json(_worker_status(switched)), media_type="application/json")

    @routes.post("/admin/workers/{worker_id}/pin", response_model=None)
    async def pin(worker_id: str, http: HttpRequest) -> Response:
        async with services.bodies.receive(http) as raw:
            body = parse_body(PinBody, raw)
        check_worker(worker_id)
        await services.backend.set_pinned(worker_id, body.pin)
        return Response(to_json({"worker_id": worker_id, "pinned": body.pin}), media_type="application/json")

    @routes.get("/admin/requests/{request_id}", response_model=None)
    async def way_of(request_id: str) -> Response:
        """Where a request has been: in flight, or among the last that have ended. By its id, or by that of its answer."""
        now, ways = services.backend.ways_of(request_id)
        if not ways:
            message = f"this router knows no request {request_id!r:.80}, or knows it no more; another may"
            raise rejected(404, "request_not_found", message, "request_id")
        found = {"requests": [way_view(way, now, has_steps=True) for way in ways]}
        return Response(to_json(found), media_type="application/json")

    @routes.get("/admin/roles", response_model=None)
    async def roles() -> Response:
        return Response(to_json(dict(services.backend.role_report().page)), media_type="application/json")

    return routes


def _router_status(status: RouterStatus) -> dict[str, Any]:
    written = dataclasses.asdict(status) | {"counters": dict(status.counters)}
    for loading, written_loading in zip(status.loading, written["loading"], strict=True):
        written_loading["progress"] = loading.progress._asdict()
    for kind, written_kind in zip(status.forecast.kinds, written["forecast"]["kinds"], strict=True):
        written_kind["seconds"] = dict(kind.seconds)
    for view, place in zip(status.workers, written["workers"], strict=True):
        place["status"] = _worker_status(view.status)
    return written


def _worker_status(status: WorkerStatus) -> dict[str, Any]:
    """The generation is text: it takes more digits than a JavaScript number, or jq's, holds."""
    written = dataclasses.asdict(status) | {"counters": dict(status.counters), "generation": str(status.generation)}
    return written | {"load": status.load._asdict()}
