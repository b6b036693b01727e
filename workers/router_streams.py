"""The streams of all attached routers: what each says goes to the reception, what all are to hear goes to each. Decides nothing."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import grpc

from workers.client import Cancel, DumpRequest, Hello, Submit
from workers.engine_thread import Command, DumpKv
from workers.errors import StreamDamaged
from workers.identity import Identity
from workers.pb import worker_pb2 as pb
from workers.reception import Reception
from workers.router_session import RouterSession
from workers.status import Load, WorkerStatus
from workers.stepping.result import StepResult
from workers.wire import frame_to_pb, router_message_from_pb
from workers.wire_seal import Sealer, Unsealer, verified

log = logging.getLogger(__name__)


class RouterStreams:
    """`status()` is the worker as it is now; `post` hands a command to the engine thread. One event loop uses it."""

    def __init__(
        self,
        identity: Identity,
        requests: Reception,
        status: Callable[[], WorkerStatus],
        post: Callable[[Command], None],
        max_pending_outputs: int,
    ) -> None:
        self._identity = identity
        self._requests = requests
        self._status = status
        self._post = post
        self._max_pending_outputs = max_pending_outputs
        self._routers: dict[int, RouterSession] = {}
        self._numbers = itertools.count(1)

    async def serve(
        self, incoming: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.WorkerFrame, None]:
        """One router's stream. When it ends, its requests end."""
        unsealer, sealer = Unsealer(), Sealer()
        messages = verified(incoming, unsealer)
        try:
            first = await anext(messages, None)
        except StreamDamaged as error:
            await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
            return
        hello = router_message_from_pb(first) if first is not None else None
        if not isinstance(hello, Hello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream begins with Hello")
            return
        session = RouterSession(hello.router_id, self._max_pending_outputs)
        number = next(self._numbers)
        self._routers[number] = session
        self._post(DumpKv(number))
        session.add_status(self._status())
        reader = asyncio.create_task(self._read(number, session, messages))
        try:
            while not session.has_ended:
                frame = await session.next_frame(self._identity.generation)
                if session.is_overrun:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the router does not keep up")
                message = frame_to_pb(frame)
                message.heard = unsealer.number
                yield sealer.seal(message)
        finally:
            reader.cancel()
            del self._routers[number]
            self._requests.leave(session)

    async def _read(self, number: int, session: RouterSession, messages: AsyncIterator[pb.RouterMessage]) -> None:
        try:
            async for message in messages:
                try:
                    parsed = router_message_from_pb(message)
                except ValueError as error:
                    log.warning("%s sent a message that cannot be read: %s", session.router_id, error)
                    continue
                match parsed:
                    case Submit():
                        self._requests.submit(session, parsed)
                    case Cancel(request_id):
                        self._requests.cancel(session, request_id)
                    case DumpRequest():
                        self._post(DumpKv(number))
                    case Hello():
                        log.warning("%s said hello twice", session.router_id)
        except StreamDamaged as error:
            log.warning("the stream of %s ends: %s", session.router_id, error)
        finally:
            session.close()

    def tell_step(self, load: Load, result: StepResult) -> None:
        """After each step of the engine; outputs go to their own routers' sessions."""
        for number, router in self._routers.items():
            router.add_load(load)
            if result.kv_dump is not None and number in result.dump_askers:
                router.add_dump(result.kv_dump)
            if result.kv_event is not None and router.add_kv_event(result.kv_event):
                self._post(DumpKv(number))

    def tell_status(self) -> None:
        status = self._status()
        for router in self._routers.values():
            router.add_status(status)

    def close(self) -> None:
        """Each stream ends with its last frame."""
        for router in self._routers.values():
            router.close()
