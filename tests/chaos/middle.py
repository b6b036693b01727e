"""Stands between everybody and one worker: passes every gRPC message on, reports each step, and lets a hand change what goes on.

The worker's address, as routers and other workers know it, is that of the first line; each connection has a gRPC channel of
its own behind it, over a second line. So a fault strikes one message of one stream, or one connection as a network would.

    client -> line -> gRPC messages, one at a time -> line -> worker
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from chaos.faults import Step
from chaos.line import Line, listen
from chaos.steps import AttachWatch, HandoffWatch
from workers.trust import parties
from workers.trust.channels import bind, open_channel
from workers.trust.credentials import Credentials

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
)


UNARY = ("SetRole", "Describe", "Fetch")
"""All other methods of a worker are streams both ways."""


@dataclass(slots=True)
class Connection:
    """One client's connection to the worker: its two lines and the channel between them."""

    head: Line
    tails: list[Line] = field(default_factory=list)
    server: asyncio.Server | None = None
    channel: grpc.aio.Channel | None = None

    def cut(self) -> None:
        for line in (self.head, *self.tails):
            line.cut()

    def black_hole(self) -> None:
        for line in (self.head, *self.tails):
            line.black_hole()

    def throttle(self, bytes_per_s: float, duration_s: float) -> None:
        for line in (self.head, *self.tails):
            line.throttle(bytes_per_s, duration_s)


@dataclass(slots=True)
class Passing:
    """A message on its way, as a hand sees it."""

    step: Step
    wire_id: str
    raw: bytes
    connection: Connection
    prefill: str
    """Worker ids; empty where the stream does not say."""
    decode: str
    handoff: HandoffWatch | None
    is_held: bool = False
    """Set by a hand: the next message of the stream shall pass before it."""


Watch = AttachWatch | HandoffWatch | None


class Hand(Protocol):
    async def touch(self, passing: Passing) -> list[bytes]:
        """Called at each step, before the message is passed on. Returns what is passed on in its place.

        RELEASED comes after the release has been passed on, with no message.
        """

    def ended(self, watch: HandoffWatch) -> None:
        """A Handoff stream has ended."""


class Middle:
    """`worker_id`'s public face; its certificate names everybody. `target` is (host, port) of the process behind it, or None while there is none."""

    def __init__(self, worker_id: str, hand: Hand, credentials: Credentials) -> None:
        self.worker_id = worker_id
        self._credentials = credentials
        self.target: tuple[str, int] | None = None
        self._hand = hand
        self._connections: dict[int, Connection] = {}
        self._runs: set[asyncio.Task[None]] = set()
        self.address = ""

    async def start(self) -> None:
        self._grpc = grpc.aio.server(options=_OPTIONS)
        self._grpc.add_generic_rpc_handlers((_Relay(self),))
        self._port = bind(self._grpc, "127.0.0.1", 0, self._credentials)
        await self._grpc.start()
        self._server, port = await listen(self._accept)
        self.address = f"127.0.0.1:{port}"

    async def close(self) -> None:
        self._server.close()
        for connection in list(self._connections.values()):
            connection.cut()
        await self._grpc.stop(grace=None)
        if self._runs:
            await asyncio.wait(self._runs)

    def cut_all(self) -> None:
        """Ends every connection, black-holed ones too."""
        for connection in list(self._connections.values()):
            connection.cut()

    async def _accept(self, head: Line) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._runs.add(task)
        connection = Connection(head)
        ports: list[int] = []

        def dialled(port: int) -> None:
            ports.append(port)
            self._connections[port] = connection

        try:
            if self.target is None:
                head.cut()
                return
            connection.server, port = await listen(lambda tail: self._tail(connection, tail))
            connection.channel = open_channel(
                f"127.0.0.1:{port}", _OPTIONS, self._credentials, parties.worker(self.worker_id)
            )
            await head.run("127.0.0.1", self._port, dialled)
        finally:
            for port in ports:
                del self._connections[port]
            connection.cut()
            if connection.channel is not None:
                await connection.channel.close()
            if connection.server is not None:
                connection.server.close()
            self._runs.discard(task)

    async def _tail(self, connection: Connection, tail: Line) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._runs.add(task)
        connection.tails.append(tail)
        try:
            if self.target is not None:
                await tail.run(*self.target)
        finally:
            tail.cut()
            connection.head.cut()  # the worker is gone, or has closed: its client is to see just that
            self._runs.discard(task)

    def connection(self, context: grpc.aio.ServicerContext) -> Connection | None:
        return self._connections.get(int(context.peer().rsplit(":", 1)[1]))

    # ---- streams ----

    async def _touch(
        self, watch: Watch, connection: Connection, raw: bytes, up: bool, held: list[bytes]
    ) -> list[bytes]:
        """What is passed on in place of a message, which may mark several steps, a frame's also of several requests.

        `held` are the messages of this direction that are to follow the next one.
        """
        passings: list[Passing] = []
        if isinstance(watch, HandoffWatch):
            steps = watch.up(raw) if up else watch.down(raw)
            passings = [self._passing(step, raw, connection, watch) for step in steps]
        elif isinstance(watch, AttachWatch):
            pairs = watch.up(raw) if up else watch.down(raw)
            passings = [Passing(step, wire_id, raw, connection, "", self.worker_id, None) for wire_id, step in pairs]
        out = [raw]
        for passing in passings:
            touched = await self._hand.touch(passing)
            out = out if touched == [raw] else touched
        if any(passing.is_held for passing in passings):
            held.append(raw)
            return []
        out = [*out, *held]
        held.clear()
        return out

    def _passing(self, step: Step, raw: bytes, connection: Connection, watch: HandoffWatch) -> Passing:
        return Passing(step, watch.wire_id, raw, connection, self.worker_id, watch.target, watch)

    async def _down(
        self,
        incoming: AsyncIterator[bytes],
        call: grpc.aio.StreamStreamCall,
        watch: Watch,
        connection: Connection,
    ) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            held: list[bytes] = []
            async for raw in incoming:
                for message in await self._touch(watch, connection, raw, False, held):
                    await call.write(message)
                if isinstance(watch, HandoffWatch) and watch.is_released:
                    await self._hand.touch(self._passing(Step.RELEASED, b"", connection, watch))
            await call.done_writing()

    async def relay(
        self, method: str, incoming: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        connection = self.connection(context)
        if connection is None or connection.channel is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is gone")
            return
        call = connection.channel.stream_stream(method)()
        watch: Watch = None
        if method.endswith("/Handoff"):
            watch = HandoffWatch(self.worker_id)
        elif method.endswith("/Attach"):
            watch = AttachWatch(self.worker_id)
        writer = asyncio.create_task(self._down(incoming, call, watch, connection))
        try:
            held: list[bytes] = []
            async for raw in call:
                for message in await self._touch(watch, connection, raw, True, held):
                    yield message
            code, details = await call.code(), await call.details()
            if code is not grpc.StatusCode.OK:
                await context.abort(code, details or "")
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            if isinstance(watch, HandoffWatch):
                self._hand.ended(watch)

    async def ask(self, method: str, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        connection = self.connection(context)
        if connection is None or connection.channel is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is gone")
            raise AssertionError
        try:
            return await connection.channel.unary_unary(method)(raw)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
            raise


class _Relay(grpc.GenericRpcHandler):
    def __init__(self, middle: Middle) -> None:
        self._middle = middle

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method
        if method.rsplit("/", 1)[1] not in UNARY:

            async def relay(incoming: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
                async for raw in self._middle.relay(method, incoming, context):
                    yield raw

            return grpc.stream_stream_rpc_method_handler(relay)

        async def ask(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return await self._middle.ask(method, raw, context)

        return grpc.unary_unary_rpc_method_handler(ask)
