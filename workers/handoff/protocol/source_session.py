"""The sending end of one KV handoff as a state machine: events in, commands out; no I/O, no clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from workers.errors import InvariantViolated
from workers.handoff.protocol.messages import (
    CancelHandoff,
    Done,
    HandoffAccepted,
    HandoffDown,
    HandoffUp,
    KvPiece,
    KvPieces,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    PrefixDone,
    ReleaseHandoff,
    SequenceMoved,
    TransportBroken,
    UseTransport,
)
from workers.handoff.protocol.transfer import Due, Lease, Transfer, TransferState
from workers.kv_memory.pieces import Cut

# ---- events that are not messages of the receiver ----


@dataclass(frozen=True, slots=True)
class Filled:
    """Entries first .. end-1 of the block table `blocks` hold the KV of their first `num_layers` layers for good."""

    blocks: tuple[int, ...]
    first: int
    end: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Described:
    """Checksums of pieces that were to be sent in this epoch."""

    epoch: int
    pieces: tuple[KvPiece, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """A SendPieces command has ended: nobody reads its blocks any more. `reason` says why it failed."""

    epoch: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream ended, or the exporter gave up. With `is_ours` the receiver does not know yet and is told."""

    reason: str
    is_ours: bool = False


SourceEvent = HandoffDown | Filled | Done | Described | Sent | Broken | Due


# ---- commands ----


@dataclass(frozen=True, slots=True)
class StartExport:
    """Have the blocks filled."""


@dataclass(frozen=True, slots=True)
class Send:
    message: HandoffUp


@dataclass(frozen=True, slots=True)
class SendPieces:
    """Send these (piece number, pool block) pairs and compute their checksums; answer with Described and with Sent."""

    epoch: int
    transport: str
    pieces: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Over, and nobody reads the blocks for this transfer any more. `reason` is empty when everything landed."""

    reason: str = ""


SourceCommand = StartExport | Send | SendPieces | Release


@dataclass(slots=True)
class SourceSession:
    """Announces pieces as they fill, keeps at most `window_bytes` unacknowledged, and holds the blocks until told to release.

    The receiver's silence for the length of the lease frees everything. Release is commanded exactly once.
    """

    cut: Cut
    accepted: HandoffAccepted
    ttl_s: float
    window_bytes: int
    transfer: Transfer = field(init=False)
    transport: str = ""
    epoch: int = 0
    acknowledged: set[int] = field(default_factory=set)
    num_resent: int = 0
    num_sending: int = 0
    """SendPieces under way; their blocks are being read."""
    is_released: bool = False
    _homes: dict[int, int] = field(default_factory=dict)
    """Pool block of each piece that has filled and is not acknowledged."""
    _num_ready: dict[int, int] = field(default_factory=dict)
    """How many pieces of each entry of the block table have filled."""
    _queue: deque[int] = field(default_factory=deque)
    _in_flight: dict[int, int] = field(default_factory=dict)
    _bytes_in_flight: int = 0
    _reason: str = ""

    def __post_init__(self) -> None:
        self.transfer = Transfer(Lease(self.ttl_s))

    @property
    def state(self) -> TransferState:
        return self.transfer.state

    def next_deadline_s(self) -> float | None:
        """When `handle(Due(), now)` is to be called at the latest; None: nothing is due before the next event."""
        return None if self.transfer.is_over else self.transfer.lease.next_deadline_s

    def open(self, now: float) -> list[SourceCommand]:
        """The first commands; call once."""
        self.transfer.lease.begin(now)
        return [Send(self.accepted), StartExport()]

    def handle(self, event: SourceEvent, now: float) -> list[SourceCommand]:
        """Commands in the order they are to be executed. After the end only the sends under way are waited for."""
        if isinstance(event, Sent):
            return self._on_sent(event, now)
        if self.transfer.is_over:
            return []
        if isinstance(event, HandoffDown):
            self.transfer.lease.heard(now)
        commands = self._react(event, now)
        if any(isinstance(command, Send) for command in commands):
            self.transfer.lease.spoke(now)
        return commands

    def _react(self, event: SourceEvent, now: float) -> list[SourceCommand]:
        match event:
            case UseTransport():
                return self._on_use(event)
            case PieceAck(pieces):
                for piece in pieces:
                    if piece in self._in_flight:
                        self._bytes_in_flight -= self._in_flight.pop(piece)
                        self.acknowledged.add(piece)
                        del self._homes[piece]
                return self._pump()
            case Filled():
                return self._on_filled(event)
            case Described(epoch, pieces):
                return [Send(KvPieces(pieces, epoch))] if epoch == self.epoch and pieces else []
            case PrefillDone() | SequenceMoved() | PrefixDone():
                return [Send(event)]
            case ReleaseHandoff():
                if self.state is TransferState.RESERVED:
                    return self._end(TransferState.FAILED, "the receiver released a transfer that never started")
                return self._end(TransferState.LANDED, "")
            case CancelHandoff(reason):
                return self._end(TransferState.FAILED, f"the receiver cancelled: {reason}")
            case OpenHandoff():
                return self._give_up(TransferState.FAILED, "the receiver opened the transfer twice")
            case Broken(reason, is_ours):
                end = self._give_up if is_ours else self._end
                return end(TransferState.FAILED, reason)
            case Due():
                return self._on_due(now)
            case Sent():
                raise InvariantViolated("Sent is handled before")

    def _on_use(self, event: UseTransport) -> list[SourceCommand]:
        if event.transport not in {offer.transport for offer in self.accepted.offers}:
            reason = f"the receiver chose {event.transport!r}, which was not offered"
            return self._give_up(TransferState.FAILED, reason)
        if self.state is TransferState.RESERVED:
            self.transfer.move(TransferState.SENDING)
        elif event.epoch <= self.epoch:
            return self._give_up(TransferState.FAILED, f"the receiver chose epoch {event.epoch} after {self.epoch}")
        self.transport, self.epoch = event.transport, event.epoch
        self.num_resent += len(self._in_flight)
        self._queue.extendleft(sorted(self._in_flight, reverse=True))
        self._in_flight.clear()
        self._bytes_in_flight = 0
        return self._pump()

    def _on_filled(self, event: Filled) -> list[SourceCommand]:
        """Queues the pieces that are complete now: those whose last layer is among the filled ones."""
        cut = self.cut
        complete = cut.pieces_before_layer(event.num_layers)
        end = min(event.end, cut.first_block + cut.num_blocks)
        for block in range(max(event.first, cut.first_block), end):
            ready = self._num_ready.get(block, 0)
            base = cut.pieces_before(block)
            for piece in range(base + ready, base + complete):
                self._homes[piece] = event.blocks[block]
                self._queue.append(piece)
            self._num_ready[block] = max(ready, complete)
        return self._pump()

    def _pump(self) -> list[SourceCommand]:
        """Sends what is complete, as far as the window allows; re-sends come first."""
        if self.state is not TransferState.SENDING:
            return []
        batch: list[tuple[int, int]] = []
        while self._queue and self._bytes_in_flight < self.window_bytes:
            piece = self._queue.popleft()
            size = self.cut.piece_bytes(piece)
            self._in_flight[piece] = size
            self._bytes_in_flight += size
            batch.append((piece, self._homes[piece]))
        if not batch:
            return []
        self.num_sending += 1
        return [SendPieces(self.epoch, self.transport, tuple(batch))]

    def _on_sent(self, event: Sent, now: float) -> list[SourceCommand]:
        self.num_sending -= 1
        if self.transfer.is_over:
            return self._settle()
        if event.reason and event.epoch == self.epoch:
            self.transfer.lease.spoke(now)
            return [Send(TransportBroken(event.epoch, event.reason))]
        return []

    def _on_due(self, now: float) -> list[SourceCommand]:
        lease = self.transfer.lease
        if now >= lease.expires_s:
            return self._give_up(TransferState.EXPIRED, f"the receiver has been silent for {lease.ttl_s:g} s")
        return [Send(KvPieces(epoch=self.epoch))] if now >= lease.heartbeat_due_s else []

    def _give_up(self, state: TransferState, reason: str) -> list[SourceCommand]:
        """Ends it and tells the receiver, which may still listen."""
        return [Send(CancelHandoff(reason)), *self._end(state, reason)]

    def _end(self, state: TransferState, reason: str) -> list[SourceCommand]:
        self.transfer.move(state)
        self._reason = reason
        return self._settle()

    def _settle(self) -> list[SourceCommand]:
        if self.num_sending or self.is_released:
            return []
        self.is_released = True
        return [Release(self._reason)]
