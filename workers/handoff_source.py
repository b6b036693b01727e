"""Serves one Handoff stream on the prefill worker: a loop around SourceSession that sends, reads and checksums."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from workers.errors import TransferFailed
from workers.kv_transfer.copier import INLINE_BYTES, describe_pieces
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.messages import HandoffUp, KvPieces
from workers.kv_transfer.source import (
    Broken,
    Release,
    Send,
    SendPieces,
    SourceEvent,
    SourceSession,
    StartPrefill,
    Tick,
)
from workers.pb import worker_pb2 as pb
from workers.wire_handoff import down_from_pb, up_to_pb

log = logging.getLogger(__name__)

TICK_S = 0.5
MAX_EVENTS = 8192
PIECES_PER_MESSAGE_BYTES = 4 << 20


class SourceDriver:
    """Runs one transfer to its end. `start_prefill` is called once; `release` exactly once, whatever happens."""

    def __init__(
        self,
        session: SourceSession,
        memory: KvMemory,
        transfer_id: str,
        generation: int,
        target_generation: int,
        start_prefill: Callable[[], None],
        release: Callable[[str], None],
    ) -> None:
        self._session = session
        self._memory = memory
        self._transfer_id = transfer_id
        self._generation = generation
        self._target_generation = target_generation
        self._start_prefill = start_prefill
        self._release = release
        self._events: asyncio.Queue[SourceEvent] = asyncio.Queue(MAX_EVENTS)
        self.sent_bytes = 0

    def post(self, event: SourceEvent) -> None:
        """An event from the engine; beyond MAX_EVENTS the transfer is given up."""
        if self._events.full():
            self._events.get_nowait()
            event = Broken("too many events for a transfer that does not move")
        self._events.put_nowait(event)

    async def run(self, incoming: AsyncIterator[pb.HandoffDown]) -> AsyncIterator[pb.HandoffUp]:
        """Yields what is to be sent. Ends when the session is over or the stream is closed."""
        reader = asyncio.create_task(self._read(incoming))
        released = False
        try:
            pending = self._session.open(time.monotonic())
            while True:
                for command in pending:
                    match command:
                        case Send(message):
                            yield self._envelope(message)
                        case SendPieces():
                            for message in await self._describe(command):
                                yield self._envelope(message)
                        case StartPrefill():
                            self._start_prefill()
                        case Release(reason):
                            released = True
                            self._release(reason)
                if self._session.is_over:
                    return
                pending = self._session.handle(await self._next_event(), time.monotonic())
        finally:
            reader.cancel()
            if not released:
                self._release("the receiver closed the stream")

    async def _next_event(self) -> SourceEvent:
        try:
            return await asyncio.wait_for(self._events.get(), TICK_S)
        except TimeoutError:
            return Tick()

    async def _read(self, incoming: AsyncIterator[pb.HandoffDown]) -> None:
        try:
            async for envelope in incoming:
                if (envelope.transfer_id, envelope.generation) != (self._transfer_id, self._target_generation):
                    raise TransferFailed("a message of another transfer or generation came in on this stream")
                await self._events.put(down_from_pb(envelope))
            await self._events.put(Broken("the receiver ended the stream"))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self._events.put(Broken(str(error)))

    async def _describe(self, command: SendPieces) -> list[KvPieces]:
        """Announcements in messages of a bounded size."""
        cut = self._session.cut
        total = sum(cut.piece_bytes(number) for number, _ in command.pieces)
        self.sent_bytes += total
        args = (self._memory, cut, command.pieces, command.with_data)
        pieces = describe_pieces(*args) if total <= INLINE_BYTES else await asyncio.to_thread(describe_pieces, *args)
        if not command.with_data:
            return [KvPieces(pieces)]
        per_message = max(1, PIECES_PER_MESSAGE_BYTES // cut.piece_bytes(command.pieces[0][0]))
        return [KvPieces(pieces[i : i + per_message]) for i in range(0, len(pieces), per_message)]

    def _envelope(self, message: HandoffUp) -> pb.HandoffUp:
        return up_to_pb(self._transfer_id, self._generation, message)
