"""Reaches workers over gRPC: one Attach stream each, and the two unary calls. Translates; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from workers.errors import InvalidRequest, Refusal, Refused, StreamDamaged, WorkerLost
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.status import Role, WorkerAddress, WorkerStatus
from workers.trust import parties
from workers.trust.channels import open_channel
from workers.trust.credentials import Credentials
from workers.wire import attach_protobuf
from workers.wire.attach import RouterHello, RouterMessage, WorkerFrame, WorkerMessage
from workers.wire.streams import ROUTER_CHANNEL, Sealer, verified

UNHEARD_S = 5.0
"""A worker says about once a second which message it has heard last; a sent one that it has not heard for so long is lost."""
LONGEST_GAP_S = 1.5
"""So much of the time between two frames counts: if there is more, this process stood still, and reads what is old."""

FINISH_S = 3.0
"""How long the last messages to a worker may take."""


class Heard:
    """Whether a worker still hears. One that goes on speaking and has not heard the last message was never sent it; with
    messages after it the worker sees the gap itself."""

    def __init__(self) -> None:
        self.expected = 0
        """Number of a message that had been sent when the worker was last up to date, and that it had not heard of then."""
        self._last_frame_s: float | None = None
        self._waited_s = 0.0

    def check(self, heard: int, sent: int, now: float) -> bool:
        """A frame says that message `heard` was the last one heard, and `sent` was sent last. False: `expected` is lost."""
        if self._last_frame_s is not None:
            self._waited_s += min(now - self._last_frame_s, LONGEST_GAP_S)
        self._last_frame_s = now
        if not heard or heard >= self.expected:
            self.expected, self._waited_s = sent, 0.0
        return self._waited_s <= UNHEARD_S


class GrpcWorkerLink:
    """A WorkerLink on a channel of its own."""

    def __init__(
        self,
        worker: WorkerAddress,
        router_id: str,
        max_pending_messages: int,
        clock: Callable[[], float],
        credentials: Credentials | None = None,
    ) -> None:
        """Must be made inside a running event loop."""
        self._target, self._worker_id = worker.target, worker.worker_id
        self._outgoing: asyncio.Queue[RouterMessage] = asyncio.Queue(max_pending_messages + 1)
        self._outgoing.put_nowait(RouterHello(router_id))
        self._is_open = True
        self._sealer = Sealer()
        self._clock = clock
        self._heard = Heard()
        self._channel = open_channel(worker.target, ROUTER_CHANNEL, credentials, parties.worker(worker.worker_id))
        self._call: Any = worker_pb2_grpc.WorkerStub(self._channel).Attach()  # type: ignore[no-untyped-call]
        self._writer = asyncio.create_task(self._write(), name=f"to-{worker.worker_id}")

    async def frames(self) -> AsyncIterator[WorkerFrame]:
        try:
            async for message in verified(self._call):
                if not self._heard.check(message.heard, self._sealer.number, self._clock()):
                    raise WorkerLost(f"{self._target} has not heard message {self._heard.expected}")
                frame = attach_protobuf.frame_from_pb(message)
                if frame.status is not None and frame.status.worker_id != self._worker_id:
                    raise ValueError(f"it calls itself {frame.status.worker_id!r:.80}")
                yield frame
        except StreamDamaged as error:
            raise WorkerLost(f"{self._target}: {error}") from error
        except grpc.aio.AioRpcError as error:
            raise WorkerLost(_describe(self._target, error)) from error
        except ValueError as error:
            raise WorkerLost(f"{self._target} sent a frame that makes no sense here: {error}") from error
        except asyncio.CancelledError:
            if self._is_open:
                raise
            return
        finally:
            was_open, self._is_open = self._is_open, False
        if was_open:
            raise WorkerLost(f"{self._target} closed the stream")

    def send(self, message: WorkerMessage) -> bool:
        if not self._is_open:
            return False
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    async def finish(self) -> None:
        if self._writer.done() or self._call.done():
            return
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(FINISH_S):
                await self._outgoing.join()
                await self._call.done_writing()

    async def close(self) -> None:
        self._is_open = False
        self._writer.cancel()
        self._call.cancel()
        await self._channel.close()

    async def _write(self) -> None:
        """Not a request iterator: gRPC leaves one waiting for ever when the worker ends the stream."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `frames` says what happened
            while True:
                message = attach_protobuf.router_message_to_pb(await self._outgoing.get())
                await self._call.write(self._sealer.seal(message))
                self._outgoing.task_done()


class GrpcWorkerClient:
    """A WorkerClient. `timeout_s` bounds the unary calls."""

    def __init__(
        self,
        max_pending_messages: int = 4096,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        credentials: Credentials | None = None,
    ) -> None:
        self._clock = clock
        self._credentials = credentials
        self._max_pending_messages = max_pending_messages
        self._timeout_s = timeout_s

    def attach(self, worker: WorkerAddress, router_id: str) -> GrpcWorkerLink:
        return GrpcWorkerLink(worker, router_id, self._max_pending_messages, self._clock, self._credentials)

    async def set_role(self, worker: WorkerAddress, role: Role, generation: int = 0) -> WorkerStatus:
        request = pb.SetRoleRequest(role=role.value, generation=generation)
        return await self._call(worker, "SetRole", request)

    async def set_draining(self, worker: WorkerAddress, is_draining: bool, generation: int = 0) -> WorkerStatus:
        request = pb.SetDrainingRequest(is_draining=is_draining, generation=generation)
        return await self._call(worker, "SetDraining", request)

    async def describe(self, worker: WorkerAddress) -> WorkerStatus:
        return await self._call(worker, "Describe", pb.DescribeRequest())

    async def _call(self, worker: WorkerAddress, method: str, request: Any) -> WorkerStatus:
        peer = parties.worker(worker.worker_id)
        async with open_channel(worker.target, ROUTER_CHANNEL, self._credentials, peer) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
            try:
                return attach_protobuf.status_from_pb(await getattr(stub, method)(request, timeout=self._timeout_s))
            except ValueError as error:
                raise WorkerLost(f"{worker.target} answered what makes no sense here: {error}") from error
            except grpc.aio.AioRpcError as error:
                raise _error_from(worker.target, error) from error


def _error_from(target: str, error: grpc.aio.AioRpcError) -> InvalidRequest | Refused | WorkerLost:
    """The error a worker meant: FAILED_PRECONDITION is a generation that has passed."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(details)
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return Refused(Refusal.STALE_GENERATION, details)
    return WorkerLost(_describe(target, error))


def _describe(target: str, error: grpc.aio.AioRpcError) -> str:
    return f"{target}: {error.code().name.lower()}: {error.details()}"
