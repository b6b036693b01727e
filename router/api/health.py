"""/health, /ready, /load, /version and /metrics: what orchestrators and monitors ask."""

from __future__ import annotations

import importlib.metadata

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.middleware import Draining
from router.api.services import Services
from router.api.sse import to_json
from workers.errors import Refusal, Refused


def health_routes(services: Services, draining: Draining) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health", response_model=None)
    async def health() -> Response:
        """Alive: this process answers. Says nothing about workers, so a cluster without them is not restarted."""
        return Response(to_json({"status": "ok"}), media_type="application/json")

    @routes.get("/ready", response_model=None)
    async def ready() -> Response:
        """Ready: a request could run now, and this router is not about to end."""
        if draining.has_begun:
            raise Refused(Refusal.SHUTTING_DOWN, "this router is about to end")
        if not services.backend.is_ready():
            raise Refused(Refusal.NO_WORKERS, "no worker can run a request now")
        return Response(to_json({"status": "ready"}), media_type="application/json")

    @routes.get("/load", response_model=None)
    async def load() -> Response:
        status = services.backend.status()
        return Response(
            to_json({"server_load": status.num_running + status.num_waiting}), media_type="application/json"
        )

    @routes.get("/version", response_model=None)
    async def version() -> Response:
        return Response(to_json({"version": product_version()}), media_type="application/json")

    @routes.get("/metrics", response_model=None)
    async def metrics(http: HttpRequest) -> Response:
        content, content_type = await services.metrics.render(http.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})

    return routes


def product_version() -> str:
    try:
        return importlib.metadata.version("baton-serve")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
