"""Serves one handoff on the sending worker: a loop around SourceSession that reads the stream, sends pieces and checksums them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from workers.errors import TransferFailed
from workers.handoff.copier import INLINE_BYTES, describe_pieces
from workers.handoff.mailbox import MAX_EVENTS, Mailbox, time_left
from workers.handoff.protobuf import down_from_pb, then_to_pb, up_to_pb
from workers.handoff.protocol.messages import Done, HandoffUp, KvPieces
from workers.handoff.protocol.source_session import (
    MAX_EPOCH,
    Described,
    Filled,
    HandoffBroken,
    Release,
    SendPieces,
    SendUp,
    Sent,
    SourceEvent,
    SourceSession,
    StartExport,
)
from workers.handoff.protocol.transfer import Due, TransferState
from workers.kv_memory.memory import KvMemory
from workers.log_context import log_about
from workers.pb import worker_pb2 as pb
from workers.status import WorkerAddress
from workers.transports.contract import OutgoingPiece, PulledTransport, Transport
from workers.wire.streams import Sealer

log = logging.getLogger(__name__)

MAX_BATCH = 8
"""Messages that one write carries beside its first."""


ExportFeed = Callable[[Filled | Done | HandoffBroken], None]
"""Takes what fills a transfer, on the event loop: blocks (never to change again until `release`), then Done; or HandoffBroken at any moment."""


class HandoffExport(Protocol):
    """What one transfer hands over."""

    @property
    def is_paced(self) -> bool:
        """It goes by how far its receiver has come."""
        ...

    def start(self) -> None:
        """Called once, when a transport is chosen: begin to feed."""

    def acknowledged(self, num_pieces: int) -> None:
        """Of a paced one: called after each event, so many pieces are in place and verified there."""

    def release(self, reason: str) -> None:
        """Called exactly once, whatever happened: nobody reads the blocks for this transfer any more. `reason` is empty when
        the receiver has everything, else it says why it has not."""


def data_id(transfer_id: str, epoch: int) -> str:
    """What a transport knows a transfer by. Each epoch has its own, so that late bytes of an earlier one find no inbox."""
    return f"{transfer_id}.{epoch}"


class SourceDriver:
    """Runs one transfer to its end: `run` in a task of its own, `outgoing` as what the gRPC handler yields.

    `open_export` is called at once with the driver's `post`, and its export is released exactly once, whatever happens.
    """

    def __init__(
        self,
        session: SourceSession,
        memory: KvMemory,
        transports: Mapping[str, Transport],
        target: WorkerAddress,
        transfer_id: str,
        generation: int,
        clock: Callable[[], float],
        takes_batches: bool = False,
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`about`: what log messages of this transfer carry."""
        self._session = session
        self._memory = memory
        self._transports = transports
        self._target = target
        self._transfer_id = transfer_id
        self._generation = generation
        self._clock = clock
        # Each piece fills once, and is described and sent at most once an epoch.
        most = MAX_EVENTS + 4 * (MAX_EPOCH + 1) * (session.cut.num_pieces + 1)
        self._events: Mailbox[SourceEvent] = Mailbox(MAX_EVENTS, most)
        self._takes_batches = takes_batches
        self.about = about
        self._out: Mailbox[HandoffUp | None] = Mailbox(MAX_EVENTS, most)
        self._sends: set[asyncio.Task[None]] = set()
        self.sent_bytes = 0
        self.checksum_s = 0.0
        self.reason = ""

    def post(self, event: SourceEvent) -> None:
        """An event from the export or from the worker; bounded by the pieces of the transfer, for each is said once."""
        self._events.post(event)

    async def run(self, incoming: AsyncIterator[pb.HandoffDown], export: HandoffExport) -> None:
        """Ends when the export is released."""
        log_about(self.about)
        reader = asyncio.create_task(self._read(incoming))
        is_released = False
        try:
            pending = deque(self._session.open(self._clock()))
            while True:
                while pending:
                    match pending.popleft():
                        case SendUp(message):
                            # What waits for a receiver that does not read says as much as a heartbeat.
                            if not (self._out and isinstance(message, KvPieces) and not message.pieces):
                                self._out.post(message)
                        case SendPieces() as command:
                            for known in self._start_sending(command):  # before whatever waits to be said after it
                                pending += self._session.handle(known, self._clock())
                        case StartExport():
                            export.start()
                        case Release(reason):
                            is_released = True
                            self.reason = reason
                            export.release(reason)
                if is_released:
                    return
                if export.is_paced and self._session.state is TransferState.SENDING:
                    export.acknowledged(len(self._session.acknowledged))
                event = await self._events.next(time_left(self._session.next_deadline_s(), self._clock()))
                pending += self._session.handle(event if event is not None else Due(), self._clock())
        finally:
            reader.cancel()
            self._out.post(None)
            if not is_released:
                if self._sends:
                    await asyncio.wait(self._sends)
                self.reason = "the worker stopped"
                export.release(self.reason)

    async def outgoing(self) -> AsyncGenerator[pb.HandoffUp, None]:
        """What is to be written to the stream; when it is not read to its end, the stream has broken."""
        sealer = Sealer()
        try:
            while (message := await self._out.next()) is not None:
                envelope = up_to_pb(self._transfer_id, self._generation, message)
                is_last = False
                if self._takes_batches:
                    # A write costs more than what is in it: the last pieces and the end of the prompt go together.
                    then, is_last = self._waiting()
                    then_to_pb(envelope, then)
                yield sealer.seal(envelope)
                if is_last:
                    return
        finally:
            self.post(HandoffBroken("the receiver closed the stream"))

    def _waiting(self) -> tuple[list[HandoffUp], bool]:
        """What is to be said at once, and whether nothing will follow it."""
        waiting: list[HandoffUp] = []
        while self._out and len(waiting) < MAX_BATCH:
            message = self._out.next_now()
            if message is None:
                return waiting, True
            waiting.append(message)
        return waiting, False

    async def _read(self, incoming: AsyncIterator[pb.HandoffDown]) -> None:
        try:
            async for envelope in incoming:
                if (envelope.transfer_id, envelope.generation) != (self._transfer_id, self._target.generation):
                    raise TransferFailed("a message of another transfer or generation came in on this stream")
                await self._events.put(down_from_pb(envelope))
            await self._events.put(HandoffBroken("the receiver ended the stream"))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self._events.put(HandoffBroken(str(error), is_ours=True))

    def _start_sending(self, command: SendPieces) -> list[SourceEvent]:
        """Has the pieces sent; returns what is known at once, where that costs less than another task: that few bytes are
        described, and that nothing is sent where the receiver fetches. The rest comes as events."""
        cut, transport = self._session.cut, self._transports[command.transport]
        num_bytes = cut.bytes_of(number for number, _ in command.pieces)
        self.sent_bytes += num_bytes
        known: list[SourceEvent] = []
        if num_bytes <= INLINE_BYTES:
            started = self._clock()
            with contextlib.suppress(Exception):  # tried again, and told, where a failure has an answer
                known.append(Described(command.epoch, describe_pieces(self._memory, cut, command.pieces)))
            self.checksum_s += self._clock() - started
        is_described = bool(known)
        if is_described and isinstance(transport, PulledTransport):
            known.append(Sent(command.epoch))
        else:
            task = asyncio.create_task(self._send_pieces(command, is_described))
            self._sends.add(task)
            task.add_done_callback(self._sends.discard)
        return known

    async def _send_pieces(self, command: SendPieces, is_described: bool) -> None:
        """Announces the pieces, if they are not, as soon as their checksums are known, and meanwhile sends them."""
        outgoing = [self._outgoing_piece(number, block) for number, block in command.pieces]
        sending = asyncio.create_task(
            self._transports[command.transport].send(self._target, data_id(self._transfer_id, command.epoch), outgoing)
        )
        reason = ""
        try:
            if not is_described:
                await self._describe(command)
            await sending
        except TransferFailed as error:
            reason = str(error)
        except Exception as error:
            log.exception("pieces could not be sent over %s", command.transport)
            reason = repr(error)
        finally:
            if not sending.done():
                await asyncio.wait({sending})
            self.post(Sent(command.epoch, reason))

    async def _describe(self, command: SendPieces) -> None:
        started = self._clock()
        pieces = await asyncio.to_thread(describe_pieces, self._memory, self._session.cut, command.pieces)
        self.checksum_s += self._clock() - started
        self.post(Described(command.epoch, pieces))

    def _outgoing_piece(self, number: int, block: int) -> OutgoingPiece:
        slot = self._session.cut.slot(number)
        view = self._memory.block(block, slot.first_layer, slot.num_layers)
        return OutgoingPiece(number, block, slot.first_layer, slot.num_layers, view)
