"""HTTP/1.1 connections with bounds: uvicorn's httptools protocol, which has none of its own, and what a client may send and take.

Per token it does nothing: the bounds are looked at where bytes arrive, where a phase of a request ends, and where writing stalls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.api.problems import Problem, rejected
from router.config import HttpConfig
from router.direct import DIRECT


class Phase(Enum):
    """Of what a client sends. IDLE: nothing is owed."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"


class ChunkedWriter:
    """A DirectWriter for one connection: the bytes that uvicorn writes for a part of a body of unknown length."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    @property
    def is_open(self) -> bool:
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, body: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class _Stop(Exception):
    """Ends the parser in the middle of what arrived."""


class UnframedCycle(RequestResponseCycle):
    """The answer to a client of HTTP/1.0, which knows no chunks: what has no length goes on until the connection is closed."""

    is_unframed = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.is_unframed = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if self.is_unframed:
                self.chunked_encoding = False
        elif self.is_unframed:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A client that breaks a bound gets one error, if nothing of an answer is under way, and is closed."""

    def __init__(self, bounds: HttpConfig, on_refused: Callable[[str], None], **options: Any) -> None:
        """`on_refused` hears why a connection was closed."""
        super().__init__(**options)
        self._bounds = bounds
        self._on_refused = on_refused
        self._phase = Phase.HEAD
        self._num_phases = 0
        self._phase_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_headers = 0
        self._head_bytes = 0
        self._idle_bytes = 0
        """Came since anything of use was complete: parts of headers, of trailers, or of a chunk's extension."""
        self._problem: Problem | None = None

    # ---- life ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._writer = ChunkedWriter(transport, self.flow)
        if len(self.connections) > self._bounds.max_connections:
            self._refuse(rejected(503, "too_many_connections", "too many connections are open").problem)
            return
        self._watch_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._phase_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # ---- what arrives ----

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        before = self._num_phases
        self._idle_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is offered; the request itself is served
        except httptools.HttpParserError:
            problem = self._problem or rejected(400, "invalid_http", "this is not an HTTP/1.1 request").problem
            self._refuse(problem)
            return
        if self._idle_bytes > self._bounds.max_header_bytes:
            self._refuse(self._head_too_large())
        elif self._num_phases != before:
            self._watch_phase()

    def on_message_begin(self) -> None:
        self._enter(Phase.HEAD)
        self._num_headers = self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is not Phase.HEAD:
            return  # of a trailer, which nothing here reads
        self._num_headers += 1
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._enter(Phase.BODY)
        if len(self.pipeline) >= self._bounds.max_pipelined:
            self._stop(rejected(400, "too_many_requests_ahead", "too many requests were sent ahead of answers").problem)
        has_chunks = self.parser.get_http_version() != "1.0"
        if has_chunks:
            self.scope["extensions"] = {DIRECT: self._writer}  # type: ignore[dict-item]
        super().on_headers_complete()
        if self.cycle is not None and not has_chunks:
            self.cycle.__class__ = UnframedCycle  # before it runs, which it does in a task

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._enter(Phase.IDLE)
        super().on_message_complete()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._num_phases += 1
        self._idle_bytes = 0

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._bounds.max_header_bytes or self._num_headers > self._bounds.max_headers:
            self._stop(self._head_too_large())

    def _head_too_large(self) -> Problem:
        what = f"headers may have {self._bounds.max_header_bytes} bytes and be {self._bounds.max_headers}"
        return rejected(431, "headers_too_large", what).problem

    def _stop(self, problem: Problem) -> None:
        self._problem = problem
        raise _Stop

    # ---- time ----

    def _watch_phase(self) -> None:
        """Bounds the time of the phase that has begun. A request that arrives at once never gets here with a timer to start."""
        if self._phase_timer is not None:
            self._phase_timer.cancel()
            self._phase_timer = None
        if self._phase is not Phase.IDLE and not self.transport.is_closing():
            bounds = self._bounds
            timeout_s = bounds.header_timeout_s if self._phase is Phase.HEAD else bounds.body_timeout_s
            self._phase_timer = self.loop.call_later(timeout_s, self._on_late)

    def _on_late(self) -> None:
        self._phase_timer = None
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or (self._phase is Phase.HEAD and is_answering):
            self._watch_phase()  # it is we who do not read, or an answer is under way before the request that is late
            return
        what = "headers" if self._phase is Phase.HEAD else "body"
        self._refuse(rejected(408, "request_timeout", f"the request's {what} did not come in time").problem)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def _watch_writing(self) -> None:
        """What waits for the client must be read in time, so that nobody keeps a connection by not reading."""
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self._bounds.write_timeout_s, self._on_unread)

    def _on_unread(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            self._on_refused("not_read")
            self.transport.abort()

    # ---- the end ----

    def _refuse(self, problem: Problem) -> None:
        """Closes the connection, with an error where no answer has begun."""
        self._on_refused(problem.code)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = problem.body()
            lines = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[problem.row.status] + lines + body)
        self.transport.close()
        self._watch_writing()
