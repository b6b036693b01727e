"""Fetches one prompt's KV from a prefill worker: a loop around TargetSession that dials, maps, copies and verifies."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from workers.errors import Refusal, TransferFailed
from workers.kv_transfer.copier import INLINE_BYTES, place_pieces
from workers.kv_transfer.memory import KvMemory, MappedKvMemory, SharedHandle
from workers.kv_transfer.messages import HandoffRefused, PrefillDone
from workers.kv_transfer.target import (
    Broken,
    Copied,
    CopyPieces,
    Fail,
    Land,
    MapFailed,
    Mapped,
    MapPool,
    Send,
    TargetEvent,
    TargetSession,
    Tick,
)
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.wire_handoff import down_to_pb, up_from_pb

log = logging.getLogger(__name__)

TICK_S = 0.5
MAX_EVENTS = 1024


@dataclass(frozen=True, slots=True)
class Handoff:
    """A prompt that landed. `transfer_s` is the time spent copying and verifying, measured."""

    done: PrefillDone
    transport: str
    kv_bytes: int
    transfer_s: float


class TargetDriver:
    """Runs one transfer from one prefill worker; `blocks` is our block table."""

    def __init__(
        self,
        session: TargetSession,
        memory: KvMemory,
        pools: PoolMaps,
        blocks: tuple[int, ...],
        transfer_id: str,
    ) -> None:
        self._session = session
        self._memory = memory
        self._pools = pools
        self._blocks = blocks
        self._transfer_id = transfer_id
        self._generation = session.opening.target.generation
        self._events: asyncio.Queue[TargetEvent] = asyncio.Queue(MAX_EVENTS)
        """From the stream, whose reader waits when it is full."""
        self._own_events: deque[TargetEvent] = deque()
        """Results of our own commands; they come first and are bounded by them."""
        self._wake = asyncio.Event()
        self._shared: MappedKvMemory | None = None
        self._copies: set[asyncio.Task[None]] = set()
        self._copy_s = 0.0

    def cancel(self) -> None:
        """Asks the transfer to end; `run` raises once nothing writes into the blocks any more."""
        self._post(Broken("the request was cancelled", Refusal.SHUTTING_DOWN))

    async def run(self, stub: worker_pb2_grpc.WorkerStub, on_landed: Callable[[Handoff], None]) -> None:
        """Calls `on_landed` once everything is in place and verified, then lets the sender go.

        Raises TransferFailed otherwise, when nothing writes into the blocks any more.
        """
        call = stub.Handoff()
        reader = asyncio.create_task(self._read(call))
        outcome: Land | Fail | None = None
        try:
            pending = self._session.open(time.monotonic())
            while True:
                for command in pending:
                    match command:
                        case Send(message):
                            await self._send(call, down_to_pb(self._transfer_id, self._generation, message))
                        case MapPool():
                            self._map(command)
                        case CopyPieces():
                            await self._copy(command)
                        case Land(done):
                            outcome = command
                            on_landed(self._handoff(done))
                        case Fail():
                            outcome = command
                if outcome is not None:
                    break
                pending = self._session.handle(await self._next_event(), time.monotonic())
        finally:
            if isinstance(outcome, Land):
                await self._close(call, reader)
            # Cancelling a pending read cancels the whole call, which could overtake the release message.
            reader.cancel()
            call.cancel()
            if self._copies:
                await asyncio.wait(self._copies)
        if isinstance(outcome, Fail):
            raise TransferFailed(outcome.reason)

    def _handoff(self, done: PrefillDone) -> Handoff:
        cut = self._session.cut
        kv_bytes = sum(cut.piece_bytes(piece) for piece in range(cut.num_pieces))
        return Handoff(done, self._session.transport, kv_bytes, self._copy_s)

    async def _send(self, call: grpc.aio.StreamStreamCall, message: object) -> None:
        try:
            await asyncio.wait_for(call.write(message), self._session.timeout_s)
        except (grpc.RpcError, TimeoutError, asyncio.InvalidStateError) as error:
            self._post(Broken(f"the stream to the prefill worker broke: {type(error).__name__}"))

    async def _close(self, call: grpc.aio.StreamStreamCall, reader: asyncio.Task[None]) -> None:
        """Lets the release message reach the sender, which then ends the stream."""
        try:
            await asyncio.wait_for(call.done_writing(), 1.0)
        except (grpc.RpcError, TimeoutError, asyncio.InvalidStateError):
            return
        await asyncio.wait({reader}, timeout=1.0)

    async def _next_event(self) -> TargetEvent:
        if not self._own_events and self._events.empty():
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), TICK_S)
            except TimeoutError:
                return Tick()
        return self._own_events.popleft() if self._own_events else self._events.get_nowait()

    async def _read(self, call: AsyncIterator[pb.HandoffUp]) -> None:
        source_generation = self._session.opening.source_generation
        try:
            async for envelope in call:
                message = up_from_pb(envelope)
                # A refusal may name the generation that the sender is in by now.
                ours = (envelope.transfer_id, envelope.generation) == (self._transfer_id, source_generation)
                if not ours and not isinstance(message, HandoffRefused):
                    raise TransferFailed("a message of another transfer or generation came in on this stream")
                await self._hear(message)
            await self._hear(Broken("the prefill worker ended the stream"))
        except asyncio.CancelledError:
            raise
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else error
            await self._hear(Broken(f"the prefill worker was lost ({code})"))
        except Exception as error:
            await self._hear(Broken(str(error)))

    def _map(self, command: MapPool) -> None:
        try:
            self._shared = self._pools.map(command)
        except TransferFailed as error:
            self._post(MapFailed(str(error)))
        else:
            self._post(Mapped())

    async def _copy(self, command: CopyPieces) -> None:
        """Copies small batches at once and hands large ones to a helper thread, whose end arrives as an event."""
        shared = self._shared if command.transport == "shm" else None
        total = sum(self._session.cut.piece_bytes(piece.piece) for piece in command.pieces)
        if total <= INLINE_BYTES:
            self._post(self._place(command, shared))
            return
        task = asyncio.create_task(self._copy_in_thread(command, shared))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copy_in_thread(self, command: CopyPieces, shared: MappedKvMemory | None) -> None:
        self._post(await asyncio.to_thread(self._place, command, shared))

    def _place(self, command: CopyPieces, shared: MappedKvMemory | None) -> Copied:
        started = time.monotonic()
        good, bad = place_pieces(self._memory, self._blocks, command.pieces, shared)
        self._copy_s += time.monotonic() - started
        return Copied(good, bad, f"{len(bad)} pieces did not match their checksum" if bad else "")

    def _post(self, event: TargetEvent) -> None:
        self._own_events.append(event)
        self._wake.set()

    async def _hear(self, event: TargetEvent) -> None:
        await self._events.put(event)
        self._wake.set()


class PoolMaps:
    """Mappings of peers' pools, kept between transfers; bounded, and dropped when their process has gone."""

    def __init__(self, max_pools: int = 64) -> None:
        self._max = max_pools
        self._pools: dict[SharedHandle, MappedKvMemory] = {}

    def map(self, command: MapPool) -> MappedKvMemory:
        """Raises TransferFailed when the pool cannot be mapped."""
        pool = self._pools.get(command.handle)
        if pool is None:
            pool = MappedKvMemory(command.handle, command.layout)
            while len(self._pools) >= self._max:
                self._pools.pop(next(iter(self._pools)))
            self._pools[command.handle] = pool
        return pool

    def drop_dead(self) -> None:
        """Unmaps the pools of processes that ended; call now and then."""
        self._pools = {handle: pool for handle, pool in self._pools.items() if os.path.exists(f"/proc/{handle.pid}")}

    def clear(self) -> None:
        self._pools.clear()
