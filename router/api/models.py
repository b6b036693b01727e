"""/v1/models: the one served model, and how long its context is."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Response

from router.api.answer import Services
from router.api.speech import require_model
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
    async def list_models() -> Response:
        model = services.backend.model
        models = {"object": "list", "data": [] if model is None else [card(model)]}
        return Response(to_json(models), media_type="application/json")

    @routes.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(name: str) -> Response:
        model = require_model(name, services.backend.model)
        return Response(to_json(card(model)), media_type="application/json")

    return routes
