"""/v1/models: the one served model, and how long its context is; not for a tenant that may not use it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.callers import caller_of, may_use
from router.api.services import Services
from router.api.speech import no_model, require_model
from router.api.sse import to_json
from workers.status import ModelInfo


def model_routes(services: Services) -> APIRouter:
    routes = APIRouter()
    started = int(time.time())

    def card(model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "baton",
            "root": model.name,
            "max_model_len": model.max_model_len,
        }

    @routes.get("/v1/models", response_model=None)
    async def list_models(http: HttpRequest) -> Response:
        model = services.backend.model
        is_shown = model is not None and may_use(caller_of(http.scope), model.name)
        models = {"object": "list", "data": [card(model)] if model is not None and is_shown else []}
        return Response(to_json(models), media_type="application/json")

    @routes.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(http: HttpRequest, name: str) -> Response:
        model = require_model(name, services.backend.model)
        if not may_use(caller_of(http.scope), model.name):
            raise no_model(name)
        return Response(to_json(card(model)), media_type="application/json")

    return routes
