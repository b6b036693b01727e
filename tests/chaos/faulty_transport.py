"""A transport with faults, around any real one: loses, delays, repeats, spoils and stalls single pieces of chosen transfers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc

from chaos.faults import Kind
from workers.config import WorkerConfig
from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.status import WorkerAddress
from workers.transports.contract import (
    Channel,
    Inbox,
    IncomingPiece,
    OutgoingPiece,
    Sweeping,
    Transport,
    View,
)
from workers.transports.factory import make_data_path
from workers.trust.credentials import Credentials

PULL = frozenset({"loopback", "shm", "nixl"})
"""Transports whose receiver reads the sender's pool: all of their faults are the receiver's."""
SENDER_KINDS = frozenset({Kind.DATA_DROP, Kind.DATA_DUPLICATE, Kind.DATA_CORRUPT, Kind.DATA_CUT, Kind.DATA_DELAY})
"""Where the sender pushes, these are the sender's."""


@dataclass(frozen=True, slots=True)
class DataFault:
    """What is to go wrong with one piece of one transfer, once."""

    kind: Kind
    piece: int
    delay_s: float


class FaultBook:
    """The faults of one process: armed by transfer id; `on_struck(transfer id)` is called when one has happened."""

    def __init__(self, on_struck: Callable[[str], None]) -> None:
        self._armed: dict[str, DataFault] = {}
        self._on_struck = on_struck

    def arm(self, transfer_id: str, fault: DataFault) -> None:
        self._armed[transfer_id] = fault

    def take(self, data_id: str, pieces: Sequence[int], kinds: frozenset[Kind]) -> DataFault | None:
        """The fault of this transfer, if it is one of `kinds` and its piece is among these; it will not come again."""
        transfer_id = data_id.rpartition(".")[0]
        fault = self._armed.get(transfer_id)
        if fault is None or fault.kind not in kinds or fault.piece not in pieces:
            return None
        del self._armed[transfer_id]
        self._on_struck(transfer_id)
        return fault


class FaultyTransport:
    """A Transport. What it does not spoil it leaves to the real one."""

    def __init__(self, inner: Transport, book: FaultBook) -> None:
        self.name = inner.name
        self._inner = inner
        self._book = book
        sends = frozenset() if inner.name in PULL else SENDER_KINDS
        self._sender_kinds = sends
        self._receiver_kinds = frozenset(kind for kind in Kind if kind.startswith("data_")) - sends

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        return self._inner.offer(target, host)

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> Channel:
        return _FaultyChannel(await self._inner.connect(source, layout, offer), self._book, self._receiver_kinds)

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        fault = self._book.take(transfer_id, [piece.piece for piece in pieces], self._sender_kinds)
        if fault is None:
            return await self._inner.send(target, transfer_id, pieces)
        rest = [piece for piece in pieces if piece.piece != fault.piece]
        (struck,) = [piece for piece in pieces if piece.piece == fault.piece]
        match fault.kind:
            case Kind.DATA_CUT:
                await self._inner.send(target, transfer_id, rest)
                raise TransferFailed("a fault: the transport broke at a piece")
            case Kind.DATA_DROP:
                await self._inner.send(target, transfer_id, rest)
            case Kind.DATA_DUPLICATE:
                await self._inner.send(target, transfer_id, [struck, *pieces, struck])
            case Kind.DATA_CORRUPT:
                spoiled = struck.view.copy()
                spoiled[len(spoiled) // 3] ^= 1
                await self._inner.send(target, transfer_id, [*rest, replace(struck, view=spoiled)])
            case Kind.DATA_DELAY:
                await self._inner.send(target, transfer_id, rest)
                await asyncio.sleep(fault.delay_s)
                await self._inner.send(target, transfer_id, [struck])

    async def forget(self, worker_id: str) -> None:
        await self._inner.forget(worker_id)

    async def sweep(self) -> None:
        if isinstance(self._inner, Sweeping):
            await self._inner.sweep()

    async def close(self) -> None:
        await self._inner.close()


class _FaultyChannel:
    def __init__(self, inner: Channel, book: FaultBook, kinds: frozenset[Kind]) -> None:
        self._inner = inner
        self._book = book
        self._kinds = kinds

    def inbox(self, transfer_id: str, place: Callable[[int], View]) -> Inbox:
        if self._book.take(transfer_id, range(1 << 16), frozenset({Kind.DATA_UNREACHABLE})) is not None:
            raise TransferFailed("a fault: the sender cannot be reached over this transport")
        return _FaultyInbox(self._inner.inbox(transfer_id, place), transfer_id, place, self._book, self._kinds)

    async def close(self) -> None:
        await self._inner.close()


class _FaultyInbox:
    def __init__(
        self, inner: Inbox, transfer_id: str, place: Callable[[int], View], book: FaultBook, kinds: frozenset[Kind]
    ) -> None:
        self._inner = inner
        self._transfer_id = transfer_id
        self._place = place
        self._book = book
        self._kinds = kinds
        self._spoiled: set[int] = set()
        self._closed = asyncio.Event()

    async def collect(self, pieces: Sequence[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        fault = self._book.take(self._transfer_id, [piece.piece for piece in pieces], self._kinds)
        if fault is None:
            return await self._inner.collect(pieces)
        rest = [piece for piece in pieces if piece.piece != fault.piece]
        match fault.kind:
            case Kind.DATA_DROP | Kind.DATA_CUT:
                lost = {fault.piece} if fault.kind is Kind.DATA_DROP else {p.piece for p in pieces}
                arrived, also = await self._inner.collect(pieces)
                return tuple(n for n in arrived if n not in lost), tuple({*also, *lost})
            case Kind.DATA_DUPLICATE:
                await self._inner.collect(pieces)
                return await self._inner.collect(pieces)
            case Kind.DATA_CORRUPT:
                result = await self._inner.collect(pieces)
                self._place(fault.piece)[0] ^= 1
                self._spoiled.add(fault.piece)
                return result
            case Kind.DATA_DELAY:
                await asyncio.sleep(fault.delay_s)
                return await self._inner.collect(pieces)
            case _:  # a stall: as a transport that waits for a piece until its own bound
                arrived, lost_too = await self._inner.collect(rest)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), fault.delay_s + 1.0)
                return arrived, (*lost_too, fault.piece)

    def checksum(self, piece: int) -> int | None:
        return None if piece in self._spoiled else self._inner.checksum(piece)

    async def close(self) -> None:
        self._closed.set()
        await self._inner.close()


def faulty_data_path(book: FaultBook) -> Callable[..., dict[str, Transport]]:
    """A data path for workers.worker.Worker with faults in all of its transports."""

    def make(
        config: WorkerConfig,
        memory: KvMemory,
        worker_id: str,
        server: grpc.aio.Server,
        credentials: Credentials | None,
    ) -> dict[str, Transport]:
        made = make_data_path(config, memory, worker_id, server, credentials)
        return {name: FaultyTransport(transport, book) for name, transport in made.items()}

    return make
