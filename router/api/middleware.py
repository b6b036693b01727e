"""The outermost layer of the API: request ids, the door, body sizes, unexpected errors and the request counter."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.access_log import AccessLog
from router.api.callers import RATE_HEADERS
from router.api.door import Door
from router.api.metrics import Metrics
from router.api.problems import Problem, describe, note_refusal, rejected
from router.config import ApiConfig
from router.tenants.tenancy import Caller, Tenancy
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


_log = logging.getLogger(__name__)
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
DISCONNECTED = "client_disconnected"
"""Metric label of a request whose client went away; the status label is then 499, as proxies have it."""


class Gate:
    """An ASGI layer in front of the whole app; whatever passes it carries x-request-id, and is counted and logged once."""

    def __init__(
        self, app: ASGIApp, config: ApiConfig, metrics: Metrics, tenancy: Tenancy, access_log: AccessLog
    ) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._access_log = access_log
        self._door = Door(config, tenancy)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        begin_s = time.monotonic()
        status = 0
        is_counted = False

        def count() -> None:
            nonlocal is_counted
            if not is_counted:
                is_counted = True
                self._metrics.count_request(scope["path"], status, state.get("refusal", ""))
                if self._access_log.is_on:
                    self._access_log.note(scope, status, begin_s)

        async def send_with_id(message: Message) -> None:
            """Counts before the last byte goes out: whoever has the answer finds it in the metrics."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request_id.encode()), *state.get(RATE_HEADERS, ())]
                message["headers"] = [*message["headers"], *more]
            elif not message.get("more_body", False):
                count()
            await send(message)

        problem: Problem | None = None
        try:
            state["caller"] = self._check(scope, headers)
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            state["refusal"] = DISCONNECTED
            status = 499
        except Exception as error:  # the last resort: nothing may leave without the shape of our errors
            problem = describe(error)
            if problem.row.status >= 500:
                _log.exception("request %s failed", request_id, extra={"request_id": request_id})
            note_refusal(scope, problem)
        if problem is not None and status == 0:
            await problem.response(scope["path"])(scope, receive, send_with_id)
        count()

    def _check(self, scope: Scope, headers: Headers) -> Caller:
        """Raises Rejected for who may not ask, and for a body that says it is too long."""
        caller = self._door.check(scope, headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:19]) > self._config.max_body_bytes:
            raise too_large(self._config)
        return caller


def too_large(config: ApiConfig) -> Exception:
    return rejected(413, "request_too_large", f"the request body is larger than {config.max_body_bytes} bytes")
