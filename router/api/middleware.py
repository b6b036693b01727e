"""The outermost layer of the API: request ids, the door, body sizes, unexpected errors and the request counter."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.config import ApiConfig
from router.api.door import Door
from router.api.metrics import Metrics
from router.api.problems import Problem, describe, note_refusal, rejected

_log = logging.getLogger(__name__)
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
DISCONNECTED = "client_disconnected"
"""Metric label of a request whose client went away; the status label is then 499, as proxies have it."""


class Gate:
    """An ASGI layer in front of the whole app; whatever passes it carries x-request-id and is counted once."""

    def __init__(self, app: ASGIApp, config: ApiConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._door = Door(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0
        is_counted = False

        def count() -> None:
            nonlocal is_counted
            if not is_counted:
                is_counted = True
                self._metrics.count_request(scope["path"], status, state.get("refusal", ""))

        async def send_with_id(message: Message) -> None:
            """Counts before the last byte goes out: whoever has the answer finds it in the metrics."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif not message.get("more_body", False):
                count()
            await send(message)

        problem: Problem | None = None
        try:
            self._check(scope, headers)
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            state["refusal"] = DISCONNECTED
            status = 499
        except Exception as error:  # the last resort: nothing may leave without the shape of our errors
            problem = describe(error)
            if problem.row.status >= 500:
                _log.exception("request %s failed", request_id)
            note_refusal(scope, problem)
        if problem is not None and status == 0:
            await problem.response()(scope, receive, send_with_id)
        count()

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises Rejected for who may not ask, and for a body that says it is too long."""
        self._door.check(scope, headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:19]) > self._config.max_body_bytes:
            raise too_large(self._config)


def too_large(config: ApiConfig) -> Exception:
    return rejected(413, "request_too_large", f"the request body is larger than {config.max_body_bytes} bytes")
