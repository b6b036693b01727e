"""The receiving end of one KV handoff as a state machine: events in, commands out; no I/O, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.errors import Refusal
from workers.handoff.protocol.messages import (
    CancelHandoff,
    Done,
    HandoffAccepted,
    HandoffDown,
    HandoffRefused,
    HandoffUp,
    KvPiece,
    KvPieces,
    Offer,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    Prefix,
    PrefixDone,
    Prompt,
    ReleaseHandoff,
    Running,
    SequenceMoved,
    TransportBroken,
    UseTransport,
)
from workers.handoff.protocol.recovery import Plan, Way
from workers.handoff.protocol.transfer import Due, Lease, Transfer, TransferState
from workers.kv_memory.memory import KvLayout, same_shape
from workers.kv_memory.pieces import Cut
from workers.transports.negotiate import negotiate

MAX_DEGRADATIONS = 3
"""How often a transfer may ask for its missing pieces again before it fails."""

_DONE_OF: dict[type, type] = {Prompt: PrefillDone, Running: SequenceMoved, Prefix: PrefixDone}


# ---- events that are not messages of the sender ----


@dataclass(frozen=True, slots=True)
class Connected:
    """An inbox is open for this epoch; nothing of an earlier epoch writes into our blocks any more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Collected:
    """Pieces that were collected: verified ones, and those that were lost or whose bytes were wrong."""

    good: tuple[int, ...]
    bad: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Closed:
    """The inbox is closed and nothing collects: nothing writes into our blocks any more."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream ended, or nobody wants the transfer any more. With `is_ours` the sender does not know yet and is told."""

    reason: str
    refusal: Refusal = Refusal.WORKER_LOST
    is_ours: bool = False


TargetEvent = HandoffUp | Connected | ConnectFailed | Collected | Closed | Broken | Due


# ---- commands ----


@dataclass(frozen=True, slots=True)
class Send:
    message: HandoffDown


@dataclass(frozen=True, slots=True)
class Connect:
    """Close the inbox of the epoch before, wait for what it collects, and open one over this offer.

    The answer is Connected or ConnectFailed, after every Collected of the epoch before.
    """

    offer: Offer
    epoch: int
    layout: KvLayout
    """Of the sender's pool, whose number of blocks is its own."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Have these pieces put in place and verify their checksums; the answer is one or more Collected."""

    pieces: tuple[KvPiece, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Stop connecting and collecting; the answer is Closed, after the last Collected."""


@dataclass(frozen=True, slots=True)
class Land:
    done: Done


@dataclass(frozen=True, slots=True)
class Fail:
    """The transfer is over and nothing writes into its blocks any more."""

    reason: str
    refusal: Refusal


TargetCommand = Send | Connect | Collect | Close | Land | Fail


@dataclass(slots=True)
class TargetSession:
    """Asks, negotiates, collects, verifies, acknowledges; over when it returns Land or Fail, which it does exactly once.

    The sender's silence for the length of the lease fails it. A piece that is lost or does not verify makes it degrade: the
    missing pieces are asked for again over the next transport both ends have (the last one is kept), at most
    MAX_DEGRADATIONS times.
    """

    cut: Cut
    opening: OpenHandoff
    ttl_s: float
    transfer: Transfer = field(init=False)
    offers: list[Offer] = field(default_factory=list)
    """What is left to try, the one in use first."""
    source_layout: KvLayout | None = None
    epoch: int = 0
    done: Done | None = None
    landed: set[int] = field(default_factory=set)
    collecting: set[int] = field(default_factory=set)
    num_resent: int = 0
    plan: Plan | None = None
    """Says whether to resend or to let another way come about; None: resend as long as that is possible."""
    is_connecting: bool = False
    _failure: Fail | None = None
    _has_ended: bool = False

    def __post_init__(self) -> None:
        self.transfer = Transfer(Lease(self.ttl_s))

    @property
    def state(self) -> TransferState:
        return self.transfer.state

    @property
    def transport(self) -> str:
        return self.offers[0].transport if self.offers else ""

    @property
    def num_degradations(self) -> int:
        return self.epoch

    @property
    def num_missing(self) -> int:
        """Pieces still to come; before `done` is known, of the whole reservation."""
        return (self.done.num_pieces if self.done else self.cut.num_pieces) - len(self.landed)

    def next_deadline_s(self) -> float | None:
        """When `handle(Due(), now)` is to be called at the latest; None: nothing is due before the next event."""
        return None if self.transfer.is_over else self.transfer.lease.next_deadline_s

    def open(self, now: float) -> list[TargetCommand]:
        """The first command; call once."""
        self.transfer.lease.begin(now)
        return [Send(self.opening)]

    def handle(self, event: TargetEvent, now: float) -> list[TargetCommand]:
        """Commands in the order they are to be executed. After the end only Closed is waited for."""
        if self.transfer.is_over:
            return self._settle() if isinstance(event, Closed) else []
        if isinstance(event, HandoffUp):
            self.transfer.lease.heard(now)
        commands = self._react(event, now)
        if any(isinstance(command, Send) for command in commands):
            self.transfer.lease.spoke(now)
        return commands

    def _react(self, event: TargetEvent, now: float) -> list[TargetCommand]:
        match event:
            case HandoffAccepted():
                return self._on_accepted(event)
            case Connected(epoch):
                return self._on_connected() if self.is_connecting and epoch == self.epoch else []
            case ConnectFailed(epoch, reason):
                return self._degrade(reason, now) if self.is_connecting and epoch == self.epoch else []
            case KvPieces():
                return self._on_pieces(event)
            case Collected():
                return self._on_collected(event, now)
            case TransportBroken(epoch, reason):
                return self._degrade(reason, now) if epoch == self.epoch and not self.is_connecting else []
            case PrefillDone() | SequenceMoved() | PrefixDone():
                return self._on_done(event)
            case HandoffRefused(refusal, message):
                return self._fail(message, refusal)
            case CancelHandoff(reason):
                return self._fail(f"the sender gave up: {reason}", Refusal.INTERNAL)
            case Broken(reason, refusal, is_ours):
                return self._give_up(reason, refusal) if is_ours else self._fail(reason, refusal)
            case Due():
                return self._on_due(now)
            case Closed():
                return []

    def _on_accepted(self, event: HandoffAccepted) -> list[TargetCommand]:
        if self.offers:
            return self._give_up("the sender accepted twice", Refusal.INTERNAL)
        if not same_shape(event.layout, self.opening.layout):
            return self._give_up("the sender has another KV layout", Refusal.INTERNAL)
        self.source_layout = event.layout
        offered = {offer.transport: offer.data for offer in event.offers}
        mine = self.opening.transports
        usable = negotiate(mine, offered, event.host, self.opening.host)
        self.offers = [Offer(name, offered[name]) for name in usable]
        if not self.offers:
            return self._give_up(f"no common transport: {mine} here, {tuple(offered)} there", Refusal.INTERNAL)
        return self._connect()

    def _connect(self) -> list[TargetCommand]:
        self.is_connecting = True
        assert self.source_layout is not None
        return [Connect(self.offers[0], self.epoch, self.source_layout)]

    def _on_connected(self) -> list[TargetCommand]:
        self.is_connecting = False
        if self.state is TransferState.RESERVED:
            self.transfer.move(TransferState.SENDING)
        return [Send(UseTransport(self.transport, self.epoch)), *self._maybe_land()]

    def _degrade(self, reason: str, now: float) -> list[TargetCommand]:
        if self.epoch == MAX_DEGRADATIONS:
            return self._give_up(f"gave up after {MAX_DEGRADATIONS} re-sends: {reason}", Refusal.INTERNAL)
        if len(self.offers) == 1 and self.is_connecting:
            return self._give_up(reason, Refusal.INTERNAL)
        if self.plan is not None:
            sizes = [self.cut.piece_bytes(piece) for piece in range(self.cut.num_pieces)]
            choice = self.plan.after_fault(
                now,
                can_resend=True,
                missing_bytes=sum(size for piece, size in enumerate(sizes) if piece not in self.landed),
                total_bytes=sum(sizes),
                is_computed=self.done is not None,
            )
            if choice.way is not Way.NEXT_TRANSPORT:
                return self._give_up(f"{reason}; sending again would take too long", Refusal.INTERNAL)
        if len(self.offers) > 1:
            self.offers.pop(0)
        self.epoch += 1
        return self._connect()

    def _on_pieces(self, event: KvPieces) -> list[TargetCommand]:
        # What the sender announced before it heard of a new choice comes again in the new epoch.
        if event.epoch != self.epoch or self.is_connecting:
            return []
        fresh: list[KvPiece] = []
        for piece in event.pieces:
            try:
                slot = self.cut.slot(piece.piece)
            except IndexError as error:
                return self._give_up(str(error), Refusal.INTERNAL)
            if (slot.block, slot.first_layer, slot.num_layers) != (piece.block, piece.first_layer, piece.num_layers):
                return self._give_up(f"piece {piece.piece} names another place than the layout", Refusal.INTERNAL)
            if piece.piece not in self.landed and piece.piece not in self.collecting:
                fresh.append(piece)
        self.collecting.update(piece.piece for piece in fresh)
        return [Collect(tuple(fresh))] if fresh else []

    def _on_collected(self, event: Collected, now: float) -> list[TargetCommand]:
        self.collecting.difference_update(event.good, event.bad)
        self.landed.update(event.good)
        self.num_resent += len(event.bad)
        commands: list[TargetCommand] = [Send(PieceAck(event.good))] if event.good else []
        if event.bad and not self.is_connecting:
            return commands + self._degrade(event.reason, now)
        # A release says more than an acknowledgement, whose write would only hold up a sequence that waits to go on.
        return self._maybe_land() or commands

    def _on_done(self, event: Done) -> list[TargetCommand]:
        if not isinstance(event, _DONE_OF[type(self.opening.subject)]):
            return self._give_up(f"the sender ended with {type(event).__name__}", Refusal.INTERNAL)
        bound = self.cut.num_pieces
        is_whole = not isinstance(event, PrefillDone) or event.num_pieces == bound
        if not is_whole or not 0 <= event.num_pieces <= bound or event.num_pieces % self.cut.pieces_per_block:
            return self._give_up(f"the sender counts {event.num_pieces} pieces, we count {bound}", Refusal.INTERNAL)
        self.done = event
        return self._maybe_land()

    def _maybe_land(self) -> list[TargetCommand]:
        is_receiving = self.state is TransferState.SENDING and not self.is_connecting
        if not is_receiving or self.done is None or self.collecting or self.num_missing > 0:
            return []
        if self.landed and max(self.landed) >= self.done.num_pieces:
            return self._give_up("the sender announced more pieces than it counts", Refusal.INTERNAL)
        self.transfer.move(TransferState.LANDED)
        self._has_ended = True
        return [Land(self.done), Send(ReleaseHandoff())]

    def _on_due(self, now: float) -> list[TargetCommand]:
        lease = self.transfer.lease
        if now >= lease.expires_s:
            reason = f"the sender has been silent for {lease.ttl_s:g} s"
            return self._give_up(reason, Refusal.WORKER_LOST, TransferState.EXPIRED)
        return [Send(PieceAck())] if now >= lease.heartbeat_due_s else []

    def _give_up(
        self, reason: str, refusal: Refusal, state: TransferState = TransferState.FAILED
    ) -> list[TargetCommand]:
        """Fails and tells the sender, which may still listen."""
        return [Send(CancelHandoff(reason)), *self._fail(reason, refusal, state)]

    def _fail(self, reason: str, refusal: Refusal, state: TransferState = TransferState.FAILED) -> list[TargetCommand]:
        self._failure = Fail(reason, refusal)
        self.transfer.move(state)
        return [Close()]

    def _settle(self) -> list[TargetCommand]:
        if self._has_ended or self._failure is None:
            return []
        self._has_ended = True
        return [self._failure]
