"""Puts a handler behind a path without FastAPI's dependencies and exit stacks, which cost more than the rest of a short request's way in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from starlette.types import Receive, Scope, Send

Handler = Callable[[HttpRequest], Awaitable[Response]]


class _Endpoint:
    """An ASGI app: what a handler answers. Errors go up to the app's handlers."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(HttpRequest(scope, receive, send))
        await response(scope, receive, send)


def plain_post(routes: APIRouter, path: str) -> Callable[[Handler], Handler]:
    """Registers a handler that takes the request alone and answers POSTs."""

    def register(handler: Handler) -> Handler:
        routes.add_route(path, _Endpoint(handler), methods=["POST"])  # type: ignore[arg-type]
        return handler

    return register


def plain_paths(router: APIRouter) -> set[tuple[str, str]]:
    """Methods and paths that were registered so: no OpenAPI document that FastAPI writes has them."""
    found: set[tuple[str, str]] = set()
    for route in router.routes:
        if isinstance(getattr(route, "endpoint", None), _Endpoint):
            found |= {(method, route.path) for method in route.methods}  # type: ignore[attr-defined]
        elif (included := getattr(route, "original_router", None)) is not None:
            found |= plain_paths(included)
    return found
