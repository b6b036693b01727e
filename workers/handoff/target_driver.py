"""Fetches KV from another worker: a loop around TargetSession that dials, connects, collects and verifies."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

import grpc

from workers.errors import Refusal, TransferFailed
from workers.handoff.copier import INLINE_BYTES, verify_pieces
from workers.handoff.mailbox import MAX_EVENTS, Mailbox, time_left
from workers.handoff.protobuf import down_to_pb, up_from_pb
from workers.handoff.protocol.messages import Done, Handoff, HandoffFailed, HandoffRefused, KvPiece, KvPieces
from workers.handoff.protocol.target_session import (
    MAX_DEGRADATIONS,
    Closed,
    CloseInbox,
    Collect,
    Collected,
    Connect,
    Connected,
    ConnectFailed,
    Fail,
    HandoffLost,
    Land,
    SendDown,
    TargetEvent,
    TargetSession,
)
from workers.handoff.protocol.transfer import Due
from workers.handoff.source_driver import data_id
from workers.kv_memory.memory import KvMemory
from workers.log_context import log_about
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.status import WorkerAddress
from workers.transports.contract import ImmediateInbox, Inbox, IncomingPiece, SealedInbox, Transport, View
from workers.wire.streams import Sealer, verified

log = logging.getLogger(__name__)

_STREAM_ERRORS = (grpc.RpcError, grpc.aio.BaseError, TimeoutError, asyncio.InvalidStateError)
"""What writing to a stream that breaks at this moment may raise; gRPC's own errors are not all of one family."""
CLOSE_S = 1.0
"""How long the last message may take to reach the sender before the stream is cut."""


class TargetDriver:
    """Runs one transfer from one sender; `blocks` is our block table. `run` in a task of its own.

    `outcome` is set, once, when nothing writes into the blocks any more: a Handoff, or HandoffFailed. The task goes on for
    a moment, until the sender has been told.
    """

    def __init__(
        self,
        session: TargetSession,
        memory: KvMemory,
        transports: Mapping[str, Transport],
        source: WorkerAddress,
        blocks: tuple[int, ...],
        transfer_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._memory = memory
        self._transports = transports
        self._source = source
        self._blocks = blocks
        self._transfer_id = transfer_id
        self._clock = clock
        self._generation = session.opening.target.generation
        # Each piece is collected at most once an epoch.
        most = MAX_EVENTS + 4 * (MAX_DEGRADATIONS + 1) * (session.cut.num_pieces + 1)
        self._events: Mailbox[TargetEvent] = Mailbox(MAX_EVENTS, most)
        self._inbox: Inbox | None = None
        self._switch: asyncio.Task[None] | None = None
        self._collects: set[asyncio.Task[None]] = set()
        self._opened_s = self._first_s = self._done_s = 0.0
        self._busy_since_s = self._busy_s = 0.0
        self.outcome: asyncio.Future[Handoff] = asyncio.get_running_loop().create_future()

    def cancel(self, reason: str = "the request was cancelled") -> None:
        """Asks the transfer to end; `outcome` comes once nothing writes into the blocks any more."""
        self._events.post(HandoffLost(reason, Refusal.SHUTTING_DOWN, is_ours=True))

    async def run(self, stub: worker_pb2_grpc.WorkerStub) -> None:
        """Always sets `outcome`. What it logs names the request, and so does what transports log for it."""
        log_about(self._session.opening.subject.log_fields)
        try:
            call = stub.Handoff()
        except grpc.aio.UsageError:
            # Another transfer has found this sender broken and closed the channel before this one began.
            self.outcome.set_exception(HandoffFailed("the channel to the sender was closed", Refusal.WORKER_LOST))
            return
        reader = asyncio.create_task(self._read(call))
        sealer = Sealer()
        try:
            self._opened_s = self._clock()
            pending = deque(self._session.open(self._opened_s))
            while not self.outcome.done():
                while pending:
                    match pending.popleft():
                        case SendDown(message):
                            envelope = down_to_pb(self._transfer_id, self._generation, message)
                            await self._send(call, sealer.seal(envelope))
                        case Connect() as command:
                            self._switch = asyncio.create_task(self._connect(command, self._switch))
                        case Collect() as command:
                            collected = self._collect_now(command)
                            if collected is None:
                                self._collect(command)
                            else:
                                pending += self._session.handle(collected, self._clock())
                        case CloseInbox():
                            closing = asyncio.create_task(self._close())
                            closing.add_done_callback(lambda _: self._events.post(Closed()))
                        case Land(done):
                            await self._close()
                            self.outcome.set_result(self._handoff(done))
                        case Fail(reason, refusal):
                            session = self._session
                            failed = HandoffFailed(reason, refusal, session.num_resent, session.num_degradations)
                            self.outcome.set_exception(failed)
                if self.outcome.done():
                    break
                event = await self._events.next(time_left(self._session.next_deadline_s(), self._clock()))
                pending += self._session.handle(event if event is not None else Due(), self._clock())
            await self._hang_up(call, reader)
        finally:
            # Cancelling a pending read cancels the whole call, which could overtake the last message.
            reader.cancel()
            call.cancel()
            await self._close()
            if not self.outcome.done():
                self.outcome.set_exception(HandoffFailed("the worker stopped", Refusal.SHUTTING_DOWN))

    def _handoff(self, done: Done) -> Handoff:
        session = self._session
        return Handoff(
            done=done,
            transport=session.transport,
            kv_bytes=session.cut.bytes_of(session.landed),
            transfer_s=self._busy_s,
            wait_s=max(0.0, self._first_s - self._opened_s),
            exposed_s=self._clock() - self._done_s if self._done_s else 0.0,
            resends=session.num_resent,
            degradations=session.num_degradations,
        )

    # ---- the control stream ----

    async def _send(self, call: grpc.aio.StreamStreamCall, message: object) -> None:
        try:
            async with asyncio.timeout(self._session.ttl_s):
                await call.write(message)
        except _STREAM_ERRORS as error:
            self._events.post(HandoffLost(f"the stream to the sender broke: {type(error).__name__}"))

    async def _hang_up(self, call: grpc.aio.StreamStreamCall, reader: asyncio.Task[None]) -> None:
        """Lets the last message reach the sender, which then ends the stream."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await call.done_writing()
        except _STREAM_ERRORS:
            return
        await asyncio.wait({reader}, timeout=CLOSE_S)

    async def _read(self, call: AsyncIterator[pb.HandoffUp]) -> None:
        source_generation = self._session.opening.source_generation
        try:
            async for envelope in verified(call):
                ours = (envelope.transfer_id, envelope.generation) == (self._transfer_id, source_generation)
                for part in (envelope, *envelope.then):
                    message = up_from_pb(part)
                    # A refusal may name the generation that the sender is in by now.
                    if not ours and not isinstance(message, HandoffRefused):
                        raise TransferFailed("a message of another transfer or generation came in on this stream")
                    if not self._first_s and isinstance(message, KvPieces) and message.pieces:
                        self._first_s = self._clock()
                    if isinstance(message, Done):
                        self._done_s = self._clock()
                    await self._events.put(message)
            await self._events.put(HandoffLost("the sender ended the stream"))
        except asyncio.CancelledError:
            raise
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else error
            await self._events.put(HandoffLost(f"the sender was lost ({code})"))
        except Exception as error:
            await self._events.put(HandoffLost(str(error), is_ours=True))

    # ---- the data path ----

    async def _connect(self, command: Connect, before: asyncio.Task[None] | None) -> None:
        name, epoch = command.offer.transport, command.epoch
        try:
            if before is not None:
                await asyncio.wait({before})
            await self._close_inbox()
            transport = self._transports[name]
            channel = await transport.connect(self._source, command.layout, command.offer.data)
            self._inbox = channel.inbox(data_id(self._transfer_id, epoch), self._place)
        except TransferFailed as error:
            self._events.post(ConnectFailed(epoch, f"{name}: {error}"))
        except Exception as error:
            log.exception("%s could not be connected", name)
            self._events.post(ConnectFailed(epoch, f"{name}: {error!r}"))
        else:
            self._events.post(Connected(epoch))

    def _place(self, piece: int) -> View:
        slot = self._session.cut.slot(piece)
        return self._memory.block(self._blocks[slot.block], slot.first_layer, slot.num_layers)

    def _collect_now(self, command: Collect) -> Collected | None:
        """What came of it, where the bytes are few and can be fetched and verified in less than a change of task takes."""
        inbox = self._inbox
        if not isinstance(inbox, ImmediateInbox) or self._collects:
            return None
        started_s = self._clock()
        try:
            found = inbox.collect_now(_wanted(command))
            if found is None:
                return None
            arrived = set(found[0])
            good = tuple(
                p.piece for p in command.pieces if p.piece in arrived and inbox.checksum(p.piece) == p.checksum
            )
        except Exception:
            log.exception("pieces could not be collected over %s", self._session.transport)
            arrived, good = set(), ()
        self._busy_s += self._clock() - started_s
        return self._result(command, len(arrived), good)

    def _collect(self, command: Collect) -> None:
        if not self._collects:
            self._busy_since_s = self._clock()
        task = asyncio.create_task(self._collect_pieces(command))
        self._collects.add(task)
        task.add_done_callback(self._collected)

    def _collected(self, task: asyncio.Task[None]) -> None:
        self._collects.discard(task)
        if not self._collects:
            self._busy_s += self._clock() - self._busy_since_s

    async def _collect_pieces(self, command: Collect) -> None:
        pieces = {p.piece: p for p in command.pieces}
        arrived: tuple[int, ...] = ()
        good: tuple[int, ...] = ()
        try:
            if self._inbox is not None:
                arrived, _ = await self._inbox.collect(_wanted(command))
            good = await self._verified([pieces[number] for number in arrived])
        except Exception:
            log.exception("pieces could not be collected over %s", self._session.transport)
        self._events.post(self._result(command, len(arrived), good))

    def _result(self, command: Collect, num_arrived: int, good: tuple[int, ...]) -> Collected:
        found = set(good)
        bad = tuple(p.piece for p in command.pieces if p.piece not in found)
        if not bad:
            return Collected(good)
        num_lost = len(command.pieces) - num_arrived
        wrong = f"{len(bad) - num_lost} did not match their checksum over {self._session.transport}"
        return Collected(good, bad, f"{num_lost} pieces were lost and {wrong}")

    async def _verified(self, arrived: list[KvPiece]) -> tuple[int, ...]:
        """Those whose bytes match: by the checksum made while they were copied, else by reading our pool. What came sealed does."""
        if isinstance(self._inbox, SealedInbox) and self._inbox.is_authenticated:
            return tuple(p.piece for p in arrived)
        known = {p.piece: self._inbox.checksum(p.piece) if self._inbox is not None else None for p in arrived}
        unread = [piece for piece in arrived if known[piece.piece] is None]
        num_bytes = self._session.cut.bytes_of(piece.piece for piece in unread)
        if num_bytes <= INLINE_BYTES:
            read = verify_pieces(unread, self._place)
        else:
            read = await asyncio.to_thread(verify_pieces, unread, self._place)
        good = set(read)
        return tuple(p.piece for p in arrived if p.piece in good or known[p.piece] == p.checksum)

    async def _close_inbox(self) -> None:
        """Afterwards nothing writes into our blocks and every Collected has been posted."""
        if self._inbox is not None:
            await self._inbox.close()
            self._inbox = None
        if self._collects:
            await asyncio.wait(set(self._collects))

    async def _close(self) -> None:
        if self._switch is not None:
            self._switch.cancel()
            await asyncio.wait({self._switch})
            self._switch = None
        await self._close_inbox()


def _wanted(command: Collect) -> list[IncomingPiece]:
    return [IncomingPiece(p.piece, p.source_block, p.first_layer, p.num_layers) for p in command.pieces]
