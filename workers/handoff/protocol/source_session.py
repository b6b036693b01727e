"""The sending end of one KV handoff as a state machine: events in, commands out; no I/O, no clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

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
from workers.handoff.protocol.transfer import LIVE, OVER, Due, Lease, Silent, TransferState
from workers.kv_memory.pieces import Cut
from workers.state_table import Rule, StateTable

MAX_EPOCH = 15
"""A receiver that asks for everything again more often than this is given up, so that what is sent for it has a bound."""

# ---- events that are not messages of the receiver ----


@dataclass(frozen=True, slots=True)
class Filled:
    """Entries first .. end-1 of a block table hold the KV of their first `num_layers` layers for good. `blocks` are the table's
    entries from `offset` on."""

    blocks: tuple[int, ...]
    first: int
    end: int
    num_layers: int
    offset: int = 0


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
class HandoffBroken:
    """The stream ended, or the exporter gave up. With `is_ours` the receiver does not know yet and is told."""

    reason: str
    is_ours: bool = False


SourceEvent = HandoffDown | Filled | Done | Described | Sent | HandoffBroken | Due


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The receiver does what it must not do. An event of the session's own, as Silent is."""

    reason: str


# ---- commands ----


@dataclass(frozen=True, slots=True)
class StartExport:
    """Have the blocks filled."""


@dataclass(frozen=True, slots=True)
class SendUp:
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


SourceCommand = StartExport | SendUp | SendPieces | Release


@dataclass(slots=True)
class SourceSession:
    """Announces pieces as they fill, keeps at most `window_bytes` unacknowledged, and holds the blocks until told to release.

    The receiver's silence for the length of the lease frees everything. Release is commanded exactly once.
    """

    cut: Cut
    accepted: HandoffAccepted
    ttl_s: float
    window_bytes: int
    lease: Lease = field(init=False)
    state: TransferState = TransferState.RESERVED
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
        self.lease = Lease(self.ttl_s)

    def next_deadline_s(self) -> float | None:
        """When `handle(Due(), now)` is to be called at the latest; None: nothing is due before the next event."""
        return None if SOURCE.is_final(self.state) else self.lease.next_deadline_s

    def open(self, now: float) -> list[SourceCommand]:
        """The first commands; call once."""
        self.lease.begin(now)
        return [SendUp(self.accepted), StartExport()]

    def handle(self, event: SourceEvent, now: float) -> list[SourceCommand]:
        """Commands in the order they are to be executed. After the end only the sends under way are waited for."""
        if isinstance(event, HandoffDown):
            self.lease.heard(now)
        commands = self._take(event, now)
        for command in commands:
            if isinstance(command, SendUp):
                self.lease.spoke(now)
        return commands

    def _take(self, event: SourceEvent | GaveUp | Silent, now: float) -> list[SourceCommand]:
        step = SOURCE.step(self.state, type(event))
        self.state = step.to
        commands: list[SourceCommand] = step.action(self, event, now) if step.action else []
        return commands

    # ---- actions of the table ----

    def _use(self, event: UseTransport, now: float) -> list[SourceCommand]:
        """SendUp what has filled over the transport that was chosen, and what is not acknowledged once more."""
        if event.transport not in {offer.transport for offer in self.accepted.offers}:
            return self._take(GaveUp(f"the receiver chose {event.transport!r}, which was not offered"), now)
        if self.transport and event.epoch <= self.epoch:
            return self._take(GaveUp(f"the receiver chose epoch {event.epoch} after {self.epoch}"), now)
        if event.epoch > MAX_EPOCH:
            return self._take(GaveUp(f"the receiver chose epoch {event.epoch} of at most {MAX_EPOCH}"), now)
        self.transport, self.epoch = event.transport, event.epoch
        self.num_resent += len(self._in_flight)
        self._queue.extendleft(sorted(self._in_flight, reverse=True))
        self._in_flight.clear()
        self._bytes_in_flight = 0
        return self._pump()

    def _acknowledge(self, event: PieceAck, now: float) -> list[SourceCommand]:
        """Forget what has arrived, and send what the window has room for."""
        in_flight, homes = self._in_flight, self._homes
        for piece in event.pieces:
            if piece in in_flight:
                self._bytes_in_flight -= in_flight.pop(piece)
                self.acknowledged.add(piece)
                del homes[piece]
        return self._pump()

    def _fill(self, event: Filled, now: float) -> list[SourceCommand]:
        """Queue the pieces that are complete now, and send what the window has room for."""
        cut = self.cut
        complete = cut.pieces_before_layer(event.num_layers)  # those whose last layer is among the filled ones
        end = min(event.end, cut.first_block + cut.num_blocks)
        num_ready, homes, queue, blocks, per_block = (
            self._num_ready, self._homes, self._queue, event.blocks, cut.pieces_per_block
        )  # fmt: skip
        base = cut.pieces_before(max(event.first, cut.first_block))
        for block in range(max(event.first, cut.first_block), end):
            ready, home = num_ready.get(block, 0), blocks[block - event.offset]
            for piece in range(base + ready, base + complete):
                homes[piece] = home
                queue.append(piece)
            num_ready[block] = max(ready, complete)
            base += per_block
        return self._pump()

    def _announce(self, event: Described, now: float) -> list[SourceCommand]:
        """Tell the receiver of the pieces, unless they are of an epoch that is over."""
        return [SendUp(KvPieces(event.pieces, event.epoch))] if event.epoch == self.epoch and event.pieces else []

    def _tell(self, event: Done, now: float) -> list[SourceCommand]:
        """Tell the receiver."""
        return [SendUp(event)]

    def _sent(self, event: Sent, now: float) -> list[SourceCommand]:
        """Tell the receiver when the transport of this epoch is broken."""
        self.num_sending -= 1
        return (
            [SendUp(TransportBroken(event.epoch, event.reason))] if event.reason and event.epoch == self.epoch else []
        )

    def _sent_late(self, event: Sent, now: float) -> list[SourceCommand]:
        """Release the blocks, if it was the last send under way."""
        self.num_sending -= 1
        return self._settle()

    def _keep_alive(self, event: Due, now: float) -> list[SourceCommand]:
        """Say that this end is alive, or find that the other is silent."""
        if now >= self.lease.expires_s:
            return self._take(Silent(f"the receiver has been silent for {self.ttl_s:g} s"), now)
        return [SendUp(KvPieces(epoch=self.epoch))] if now >= self.lease.heartbeat_due_s else []

    def _land(self, event: ReleaseHandoff, now: float) -> list[SourceCommand]:
        """Release the blocks, once nothing is being sent."""
        return self._settle()

    def _released_early(self, event: ReleaseHandoff, now: float) -> list[SourceCommand]:
        """Release the blocks of a transfer that never started."""
        return self._settle("the receiver released a transfer that never started")

    def _cancelled(self, event: CancelHandoff, now: float) -> list[SourceCommand]:
        """Release the blocks, once nothing is being sent."""
        return self._settle(f"the receiver cancelled: {event.reason}")

    def _broke(self, event: HandoffBroken, now: float) -> list[SourceCommand]:
        """Tell the receiver if it does not know yet; release the blocks, once nothing is being sent."""
        return self._give_up(event, now) if event.is_ours else self._settle(event.reason)

    def _opened_twice(self, event: OpenHandoff, now: float) -> list[SourceCommand]:
        """Tell the receiver; release the blocks, once nothing is being sent."""
        return self._give_up(GaveUp("the receiver opened the transfer twice"), now)

    def _give_up(self, event: GaveUp | Silent | HandoffBroken, now: float) -> list[SourceCommand]:
        """Tell the receiver, which may still listen; release the blocks, once nothing is being sent."""
        return [SendUp(CancelHandoff(event.reason)), *self._settle(event.reason)]

    # ---- what they have in common ----

    def _pump(self) -> list[SourceCommand]:
        """Sends what is complete, as far as the window allows; re-sends come first."""
        if self.state is not TransferState.SENDING:
            return []
        batch: list[tuple[int, int]] = []
        queue, in_flight, homes, sizes = self._queue, self._in_flight, self._homes, self.cut.part_bytes
        num_bytes, num_parts = self._bytes_in_flight, len(sizes)
        while queue and num_bytes < self.window_bytes:
            piece = queue.popleft()
            size = in_flight[piece] = sizes[piece % num_parts]
            num_bytes += size
            batch.append((piece, homes[piece]))
        self._bytes_in_flight = num_bytes
        if not batch:
            return []
        self.num_sending += 1
        return [SendPieces(self.epoch, self.transport, tuple(batch))]

    def _settle(self, reason: str = "") -> list[SourceCommand]:
        self._reason = self._reason or reason
        if self.num_sending or self.is_released:
            return []
        self.is_released = True
        return [Release(self._reason)]


_LATE: tuple[Any, ...] = (
    UseTransport, PieceAck, ReleaseHandoff, CancelHandoff, OpenHandoff, Filled, PrefillDone, SequenceMoved, PrefixDone,
    Described, HandoffBroken, Due,
)  # fmt: skip
_S = TransferState
SOURCE: StateTable[TransferState] = StateTable(
    "the sending end of a handoff",
    (
        Rule(LIVE, (UseTransport,), _S.SENDING, SourceSession._use),
        Rule(LIVE, (PieceAck,), None, SourceSession._acknowledge),
        Rule(LIVE, (Filled,), None, SourceSession._fill),
        Rule(LIVE, (Described,), None, SourceSession._announce),
        Rule(LIVE, (PrefillDone, SequenceMoved, PrefixDone), None, SourceSession._tell),
        Rule(LIVE, (Sent,), None, SourceSession._sent),
        Rule(LIVE, (Due,), None, SourceSession._keep_alive),
        Rule((_S.SENDING,), (ReleaseHandoff,), _S.LANDED, SourceSession._land),
        Rule((_S.RESERVED,), (ReleaseHandoff,), _S.FAILED, SourceSession._released_early),
        Rule(LIVE, (CancelHandoff,), _S.FAILED, SourceSession._cancelled),
        Rule(LIVE, (HandoffBroken,), _S.FAILED, SourceSession._broke),
        Rule(LIVE, (OpenHandoff,), _S.FAILED, SourceSession._opened_twice),
        Rule(LIVE, (GaveUp,), _S.FAILED, SourceSession._give_up),
        Rule(LIVE, (Silent,), _S.EXPIRED, SourceSession._give_up),
        Rule(OVER, (Sent,), None, SourceSession._sent_late),
        Rule(OVER, _LATE, None),
    ),
)
"""What comes late, after the end, changes nothing, but that the last send under way is waited for."""
