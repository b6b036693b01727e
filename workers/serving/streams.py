"""The Attach streams of routers: reads what they say, writes the frames that the core gives out. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import grpc

from workers.errors import StreamDamaged
from workers.pb import worker_pb2 as pb
from workers.serving.events import Event, FrameWanted, RouterAttached, RouterLeft, RouterLost, RouterSaid
from workers.trust.gate import may_be
from workers.trust.parties import Kind
from workers.wire.attach import RouterHello, WorkerFrame
from workers.wire.attach_protobuf import frame_to_pb, router_message_from_pb
from workers.wire.streams import Sealer, Unsealer, verified

log = logging.getLogger(__name__)

HELLO_S = 10.0
"""How long a stream may take to say whose it is."""


class _Stream:
    """One stream, as far as the core's commands concern it. `task` is the call's own."""

    def __init__(self, router_id: str, context: grpc.aio.ServicerContext, task: asyncio.Task[object]) -> None:
        self.router_id = router_id
        self.context = context
        self.task = task
        self.frame: WorkerFrame | None = None
        """To be written next; None once there is a wake: the stream ends."""
        self.wake = asyncio.Event()


class Streams:
    """`handle` takes an event for the core; at most `max_streams` are open at once. Used from the event loop only."""

    def __init__(self, handle: Callable[[Event], None], max_streams: int) -> None:
        self._handle = handle
        self._max_streams = max_streams
        self._num_open = 0
        self._numbers = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._aborting: set[asyncio.Task[None]] = set()

    async def serve(
        self, incoming: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.WorkerFrame, None]:
        """One router's stream."""
        if self._num_open >= self._max_streams:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_streams} routers are attached already")
        self._num_open += 1
        try:
            async with aclosing(self._serve(incoming, context)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._num_open -= 1

    async def _serve(
        self, incoming: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.WorkerFrame, None]:
        unsealer, sealer = Unsealer(), Sealer()
        messages = verified(incoming, unsealer)
        hello = await self._hello(messages, context)
        task = asyncio.current_task()
        assert task is not None
        number = next(self._numbers)
        stream = self._streams[number] = _Stream(hello.router_id, context, task)
        self._handle(RouterAttached(number, hello.router_id))
        reader = asyncio.create_task(self._read(number, stream, messages))
        try:
            while True:
                self._handle(FrameWanted(number))
                await stream.wake.wait()
                stream.wake.clear()
                frame, stream.frame = stream.frame, None
                if frame is None:
                    return
                message = frame_to_pb(frame)
                message.heard = unsealer.number
                yield sealer.seal(message)
        finally:
            reader.cancel()
            if self._streams.pop(number, None) is not None:
                self._handle(RouterLost(number))

    async def _hello(self, messages: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext) -> RouterHello:
        """The first message, of the router that the caller's certificate names; otherwise the call is aborted."""
        hello = None
        try:
            async with asyncio.timeout(HELLO_S):
                first = await anext(messages, None)
            hello = router_message_from_pb(first) if first is not None else None
        except StreamDamaged as error:
            await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        except (TimeoutError, ValueError):
            pass
        if not isinstance(hello, RouterHello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream begins with RouterHello")
        assert isinstance(hello, RouterHello)
        if not may_be(context, Kind.ROUTER, hello.router_id):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the certificate is another router's")
        return hello

    async def _read(self, number: int, stream: _Stream, messages: AsyncIterator[pb.RouterMessage]) -> None:
        level = logging.WARNING
        try:
            async for message in messages:
                try:
                    parsed = router_message_from_pb(message)
                except ValueError as error:
                    log.log(level, "%s sent a message that cannot be read: %s", stream.router_id, error)
                    level = logging.DEBUG  # a router of a later version sends such with every job
                    continue
                self._handle(RouterSaid(number, parsed))
        except StreamDamaged as error:
            log.warning("the stream of %s ends: %s", stream.router_id, error)
        finally:
            self._handle(RouterLeft(number))

    def write(self, number: int, frame: WorkerFrame) -> None:
        """As WriteFrame."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.frame = frame
            stream.wake.set()

    def end(self, number: int) -> None:
        """As EndStream."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.wake.set()

    def cut(self, number: int, reason: str) -> None:
        """As CutStream."""
        stream = self._streams.pop(number, None)
        if stream is not None:
            asyncio.get_running_loop().call_soon(self._handle, RouterLost(number))
            log.warning("the stream of %s is cut: %s", stream.router_id, reason)
            stream.task.cancel()  # a write that waits for the router would never come back to us
            aborting = asyncio.create_task(self._abort(stream, reason), name=f"cut-{stream.router_id}")
            self._aborting.add(aborting)
            aborting.add_done_callback(self._aborting.discard)

    async def _abort(self, stream: _Stream, reason: str) -> None:
        """The router finds out when it has read what had been written, or its connection ends, whichever comes first."""
        with contextlib.suppress(Exception):
            await stream.context.abort(grpc.StatusCode.ABORTED, reason)
