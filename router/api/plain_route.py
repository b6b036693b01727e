"""Puts a handler behind a path without FastAPI's dependencies, exit stacks and search for a route, which cost more than the rest of a short
request's way in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.problems import answer_problem
from workers.errors import BatonError

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


class PlainRoutes:
    """An ASGI layer in front of the router: what was registered so is called at once, its errors are answered as the app's handlers do."""

    def __init__(self, app: ASGIApp, routes: APIRouter) -> None:
        self._app = app
        self._routes = routes
        self._endpoints: dict[tuple[str, str], ASGIApp] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._endpoints is None:  # all are registered by now
            self._endpoints = plain_endpoints(self._routes)
        endpoint = self._endpoints.get((scope.get("method", ""), scope.get("path", "")))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        is_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await endpoint(scope, receive, send_noting)
        except BatonError as error:
            if is_begun:
                raise
            response = await answer_problem(HttpRequest(scope, receive, send), error)
            await response(scope, receive, send)


def plain_endpoints(router: APIRouter) -> dict[tuple[str, str], ASGIApp]:
    """What was registered so, by method and path: no OpenAPI document that FastAPI writes has them."""
    found: dict[tuple[str, str], ASGIApp] = {}
    for route in router.routes:
        endpoint = getattr(route, "endpoint", None)
        if isinstance(endpoint, _Endpoint):
            found |= {(method, route.path): endpoint for method in route.methods}  # type: ignore[attr-defined]
        elif (included := getattr(route, "original_router", None)) is not None:
            found |= plain_endpoints(included)
    return found
