"""How the bytes of KV pieces travel: the one protocol that every transport speaks. Which piece is wanted when, is the sessions' business.

A transfer has a control stream (gRPC, small messages: what is filled, its checksum, acknowledgements) and a data path, which is
one of these transports. The control stream negotiates: the sender sends an offer for every transport that it could use for
this receiver, the receiver connects to the best one, and on failure to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from workers.kv_memory.memory import KvLayout
from workers.status import WorkerAddress

View = npt.NDArray[np.uint8]
"""Bytes of one piece inside a KV pool, uint8 [piece_bytes], contiguous."""


@dataclass(frozen=True, slots=True)
class OutgoingPiece:
    """A filled piece at the sender: its number in the transfer, where its bytes are in the sender's pool."""

    piece: int
    source_block: int
    first_layer: int
    num_layers: int
    view: View


@dataclass(frozen=True, slots=True)
class IncomingPiece:
    """A piece that the sender has announced: where the sender has it. Its home in our pool comes from the inbox's `place`."""

    piece: int
    source_block: int
    first_layer: int
    num_layers: int


class Inbox(Protocol):
    """The receiver's end of one transfer on one transport."""

    async def collect(self, pieces: Sequence[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (arrived, lost) piece numbers once each piece is wholly in its place or never will be.

        Bytes are not verified here. Never raises for the world's faults: a broken channel loses its pieces. Bounded by
        the transport's timeout without progress.
        """

    def checksum(self, piece: int) -> int | None:
        """XXH3-64 of an arrived piece where it was computed while the bytes were copied; None: read it from the pool."""

    async def close(self) -> None:
        """After this nothing writes into our pool for this transfer any more; what still arrives is thrown away."""


@runtime_checkable
class ImmediateInbox(Protocol):
    """An inbox that can fetch few bytes at once, which takes less than a change of thread or task."""

    def collect_now(self, pieces: Sequence[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """As `collect`, on the event loop; None, and nothing is done: there are too many bytes for that."""
        ...


@runtime_checkable
class SealedInbox(Protocol):
    """An inbox whose pieces may need no checksum."""

    @property
    def is_authenticated(self) -> bool:
        """What has arrived is, bit for bit, what the sender sent: it opened with a key that only these two ends have."""
        ...


class Channel(Protocol):
    """A connection from this receiver to one sender over one transport; shared by all transfers between the two."""

    def inbox(self, transfer_id: str, place: Callable[[int], View]) -> Inbox:
        """Must be called before the sender is told to use the transport. `place(piece)` is where a piece belongs in our pool.

        `place` may be called on a helper thread, and raises IndexError for a number outside the transfer.
        """

    async def close(self) -> None:
        """Aborts this channel alone; its inboxes lose what has not arrived."""


class Transport(Protocol):
    """One way for bytes to travel, for one worker process, as sender and as receiver. Used from one event loop."""

    name: str
    """As in worker.transports and on the wire: loopback, cuda_ipc, shm, nccl, nixl, tcp, gloo, grpc."""

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        """As the sender: what that receiver needs to connect, opaque and small; None when it cannot be served this way.

        `host` is the receiver's host name, to rule out what only works on one host.
        """

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> Channel:
        """As the receiver: a channel to that sender, kept and shared between transfers. Raises TransferFailed."""

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        """As the sender: returns when the views may be overwritten as far as this transport is concerned (pull transports: at
        once; the session holds the blocks until they are acknowledged). Raises TransferFailed. Waits are bounded."""

    async def forget(self, worker_id: str) -> None:
        """Drops what is kept for a peer that is gone or came back in another generation."""

    async def close(self) -> None:
        """Ends everything; safe to call twice."""


@runtime_checkable
class PulledTransport(Protocol):
    """A transport whose receiver fetches announced pieces by itself: its `send` has nothing to do and need not be called."""

    is_pulled: bool


@runtime_checkable
class ServedTransport(Protocol):
    """A transport that the worker's own gRPC server serves."""

    def handlers(self) -> tuple[Any, ...]:
        """For grpc.aio.Server.add_generic_rpc_handlers, before the server starts."""
        ...


@runtime_checkable
class Sweeping(Protocol):
    """A transport that keeps something of a peer which nothing tells it that the peer is dead."""

    async def sweep(self) -> None:
        """Lets go of what dead peers left behind; called about once a second."""
