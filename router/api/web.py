"""What web pages, proxies and monitors ask beside the endpoints' own methods: CORS, HEAD, OPTIONS, a prefix of all paths."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.endpoints import ENDPOINTS
from router.config import CorsConfig

_SHOWN = ("x-request-id", "x-should-retry", "retry-after")
"""Headers of answers that a page may read."""


class Prefix:
    """An ASGI layer that takes the prefix off paths, where a proxy has not done so."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._prefix or path.startswith(self._prefix + "/"):
            scope = {**scope, "path": path.removeprefix(self._prefix) or "/"}
        await self._app(scope, receive, send)


class Cors(CORSMiddleware):
    """Starlette's, for all but /admin: no page of another place is told that it may call that."""

    def __init__(self, app: ASGIApp, config: CorsConfig) -> None:
        super().__init__(
            app,
            allow_origins=config.origins,
            allow_methods=config.methods,
            allow_headers=config.headers,
            expose_headers=_SHOWN,
            max_age=config.max_age_s,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] == "/admin" or scope["path"].startswith("/admin/")):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class PlainMethods:
    """An ASGI layer that answers HEAD as GET without a body, and OPTIONS and a 405 with the methods that a path has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._paths = [(compile_path(endpoint.path)[0], endpoint.method.upper()) for endpoint in ENDPOINTS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        if method == "HEAD":
            await self._head({**scope, "method": "GET"}, receive, self._naming_all(scope, send))
        elif method == "OPTIONS" and (methods := self._methods(scope)):
            await Response(status_code=204, headers={"allow": ", ".join(methods)})(scope, receive, send)
        else:
            await self._app(scope, receive, self._naming_all(scope, send))

    def _naming_all(self, scope: Scope, send: Send) -> Send:
        """A 405 names the methods of all routes of its path; Starlette's has those of one."""

        async def send_allow(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 405:
                kept = [(name, value) for name, value in message["headers"] if name != b"allow"]
                message["headers"] = [*kept, (b"allow", ", ".join(self._methods(scope)).encode())]
            await send(message)

        return send_allow

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends what would be sent after the headers: it may be a stream without an end."""
        is_done = False

        async def send_head(message: Message) -> None:
            nonlocal is_done
            if is_done:
                raise OSError("a HEAD request is answered")
            await send(message)
            if message["type"] == "http.response.start":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                is_done = True

        try:
            await self._app(scope, receive, send_head)
        except (OSError, ClientDisconnect):
            if not is_done:
                raise

    def _methods(self, scope: Scope) -> list[str]:
        """Those of a path; none: there is no such path."""
        found = {method for path, method in self._paths if path.match(scope["path"])}
        if not found:
            return []
        return sorted(found | {"OPTIONS"} | ({"HEAD"} if "GET" in found else set()))
