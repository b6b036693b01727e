"""Lets a router end without cutting answers: what runs may finish, what comes is told to go elsewhere."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.errors import Refusal, Refused


class Draining:
    """Whether this router is about to end, and how many requests it still answers. One event loop."""

    def __init__(self) -> None:
        self.has_begun = False
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """From now on requests for work are refused with SHUTTING_DOWN, and /ready says so."""
        self.has_begun = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nothing is answered any more; False when something still is after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def enter(self) -> None:
        """A request for work begins."""
        self._num_running += 1
        self._idle.clear()

    def leave(self) -> None:
        """It has ended, however it did."""
        self._num_running -= 1
        if not self._num_running:
            self._idle.set()


class DrainingGate:
    """An ASGI layer below the one that shapes errors: it counts requests under /v1 and the like, and turns them away in the end.

    Operators' and monitors' paths (/health, /metrics, /admin ...) are answered until the router is gone.
    """

    def __init__(self, app: ASGIApp, draining: Draining, open_paths: frozenset[str]) -> None:
        self._app = app
        self._draining = draining
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        draining = self._draining
        path = scope.get("path", "")
        if scope["type"] != "http" or path in self._open_paths or path.startswith("/admin"):
            await self._app(scope, receive, send)
            return

        if draining.has_begun:
            raise Refused(Refusal.SHUTTING_DOWN, "this router is about to end; send the request to another one")

        async def send_and_close(message: Message) -> None:
            """Whoever kept the connection for its next request is to open one elsewhere."""
            if message["type"] == "http.response.start" and draining.has_begun:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        draining.enter()
        try:
            await self._app(scope, receive, send_and_close)
        finally:
            draining.leave()
