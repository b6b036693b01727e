"""The receiving end of one KV handoff as a state machine: events in, commands out; no I/O, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workers.errors import Refusal
from workers.handoff.protocol.choices import Plan, Recovery, negotiate
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
    PrefixDone,
    PrefixSubject,
    PromptSubject,
    ReleaseHandoff,
    RunningSubject,
    SequenceMoved,
    TransportBroken,
    UseTransport,
)
from workers.handoff.protocol.transfer import LIVE, OVER, Due, Lease, Silent, TransferState
from workers.kv_memory.memory import KvLayout, same_shape
from workers.kv_memory.pieces import Cut
from workers.state_table import Rule, StateTable

MAX_DEGRADATIONS = 3
"""How often a transfer may ask for its missing pieces again before it fails."""

_DONE_OF: dict[type, type] = {PromptSubject: PrefillDone, RunningSubject: SequenceMoved, PrefixSubject: PrefixDone}


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
class HandoffLost:
    """The stream ended, or nobody wants the transfer any more. With `is_ours` the sender does not know yet and is told."""

    reason: str
    refusal: Refusal = Refusal.WORKER_LOST
    is_ours: bool = False


TargetEvent = HandoffUp | Connected | ConnectFailed | Collected | Closed | HandoffLost | Due


@dataclass(frozen=True, slots=True)
class Reached:
    """The sender's pool is reached over the transport in use. An event of the session's own, as the next two and Silent are."""


@dataclass(frozen=True, slots=True)
class Complete:
    """Every piece that the sender counts is in place and verified."""


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The sender does what it must not do, or nothing is left to try."""

    reason: str


# ---- commands ----


@dataclass(frozen=True, slots=True)
class SendDown:
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
class CloseInbox:
    """Stop connecting and collecting; the answer is Closed, after the last Collected."""


@dataclass(frozen=True, slots=True)
class Land:
    done: Done


@dataclass(frozen=True, slots=True)
class Fail:
    """The transfer is over and nothing writes into its blocks any more."""

    reason: str
    refusal: Refusal


TargetCommand = SendDown | Connect | Collect | CloseInbox | Land | Fail


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
    lease: Lease = field(init=False)
    state: TransferState = TransferState.RESERVED
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
        self.lease = Lease(self.ttl_s)

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
        return None if TARGET.is_final(self.state) else self.lease.next_deadline_s

    def open(self, now: float) -> list[TargetCommand]:
        """The first command; call once."""
        self.lease.begin(now)
        return [SendDown(self.opening)]

    def handle(self, event: TargetEvent, now: float) -> list[TargetCommand]:
        """Commands in the order they are to be executed. After the end only Closed is waited for."""
        if isinstance(event, HandoffUp):
            self.lease.heard(now)
        commands = self._take(event, now)
        for command in commands:
            if isinstance(command, SendDown):
                self.lease.spoke(now)
        return commands

    def _take(self, event: TargetEvent | Reached | Complete | GaveUp | Silent, now: float) -> list[TargetCommand]:
        step = TARGET.step(self.state, type(event))
        self.state = step.to
        commands: list[TargetCommand] = step.action(self, event, now) if step.action else []
        return commands

    # ---- actions of the table ----

    def _accept(self, event: HandoffAccepted, now: float) -> list[TargetCommand]:
        """Connect over the best transport that both ends have."""
        if self.offers:
            return self._take(GaveUp("the sender said HandoffAccepted out of turn"), now)
        if not same_shape(event.layout, self.opening.layout):
            return self._take(GaveUp("the sender has another KV layout"), now)
        self.source_layout = event.layout
        offered = {offer.transport: offer.data for offer in event.offers}
        mine = self.opening.transports
        usable = negotiate(mine, offered, event.host, self.opening.host)
        self.offers = [Offer(name, offered[name]) for name in usable]
        if not self.offers:
            return self._take(GaveUp(f"no common transport: {mine} here, {tuple(offered)} there"), now)
        return self._connect()

    def _connected(self, event: Connected, now: float) -> list[TargetCommand]:
        """Go on, unless it was for an epoch that is over."""
        if not self.is_connecting or event.epoch != self.epoch:
            return []
        self.is_connecting = False
        return self._take(Reached(), now)

    def _use(self, event: Reached, now: float) -> list[TargetCommand]:
        """Ask for the pieces over the transport that is connected."""
        return [SendDown(UseTransport(self.transport, self.epoch)), *self._land_if_complete(now)]

    def _connect_failed(self, event: ConnectFailed, now: float) -> list[TargetCommand]:
        """Try the next transport, or give up."""
        return self._degrade(event.reason, now) if self.is_connecting and event.epoch == self.epoch else []

    def _transport_broke(self, event: TransportBroken, now: float) -> list[TargetCommand]:
        """Ask for what is missing over the next transport, or give up."""
        return self._degrade(event.reason, now) if event.epoch == self.epoch and not self.is_connecting else []

    def _collect(self, event: KvPieces, now: float) -> list[TargetCommand]:
        """Have the pieces put in place and verified, unless they are of an epoch that is over."""
        # What the sender announced before it heard of a new choice comes again in the new epoch.
        if event.epoch != self.epoch or self.is_connecting:
            return []
        fresh: list[KvPiece] = []
        slot_of, landed, collecting = self.cut.slot, self.landed, self.collecting
        for piece in event.pieces:
            number = piece.piece
            try:
                slot = slot_of(number)
            except IndexError as error:
                return self._take(GaveUp(str(error)), now)
            if slot != piece[1:4]:
                return self._take(GaveUp(f"piece {number} names another place than the layout"), now)
            if number not in landed and number not in collecting:
                fresh.append(piece)
        collecting.update([piece.piece for piece in fresh])
        return [Collect(tuple(fresh))] if fresh else []

    def _collected(self, event: Collected, now: float) -> list[TargetCommand]:
        """Acknowledge what is in place, and ask again for what is lost or wrong."""
        self.collecting.difference_update(event.good, event.bad)
        self.landed.update(event.good)
        self.num_resent += len(event.bad)
        commands: list[TargetCommand] = [SendDown(PieceAck(event.good))] if event.good else []
        if event.bad and not self.is_connecting:
            return commands + self._degrade(event.reason, now)
        # A release says more than an acknowledgement, whose write would only hold up a sequence that waits to go on.
        return self._land_if_complete(now) or commands

    def _count(self, event: Done, now: float) -> list[TargetCommand]:
        """Remember how many pieces there are."""
        if not isinstance(event, _DONE_OF[type(self.opening.subject)]):
            return self._take(GaveUp(f"the sender ended with {type(event).__name__}"), now)
        bound = self.cut.num_pieces
        is_whole = not isinstance(event, PrefillDone) or event.num_pieces == bound
        if not is_whole or not 0 <= event.num_pieces <= bound or event.num_pieces % self.cut.pieces_per_block:
            return self._take(GaveUp(f"the sender counts {event.num_pieces} pieces, we count {bound}"), now)
        if not self._adds_up(event):
            return self._take(GaveUp("the sender counts other blocks than pieces"), now)
        self.done = event
        return self._land_if_complete(now)

    def _keep_alive(self, event: Due, now: float) -> list[TargetCommand]:
        """Say that this end is alive, or find that the other is silent."""
        if now >= self.lease.expires_s:
            return self._take(Silent(f"the sender has been silent for {self.ttl_s:g} s"), now)
        return [SendDown(PieceAck())] if now >= self.lease.heartbeat_due_s else []

    def _land(self, event: Complete, now: float) -> list[TargetCommand]:
        """Hand over what has landed, and have the sender release its blocks."""
        assert self.done is not None
        self._has_ended = True
        return [Land(self.done), SendDown(ReleaseHandoff())]

    def _out_of_turn(self, event: HandoffUp, now: float) -> list[TargetCommand]:
        """Tell the sender, which may still listen; close, and fail."""
        return self._give_up(GaveUp(f"the sender said {type(event).__name__} out of turn"), now)

    def _refused(self, event: HandoffRefused, now: float) -> list[TargetCommand]:
        """CloseInbox, and fail as the sender says."""
        return self._close(event.message, event.refusal)

    def _cancelled(self, event: CancelHandoff, now: float) -> list[TargetCommand]:
        """CloseInbox, and fail."""
        return self._close(f"the sender gave up: {event.reason}", Refusal.INTERNAL)

    def _broke(self, event: HandoffLost, now: float) -> list[TargetCommand]:
        """Tell the sender if it does not know yet; close, and fail."""
        told: list[TargetCommand] = [SendDown(CancelHandoff(event.reason))] if event.is_ours else []
        return told + self._close(event.reason, event.refusal)

    def _give_up(self, event: GaveUp, now: float) -> list[TargetCommand]:
        """Tell the sender, which may still listen; close, and fail."""
        return [SendDown(CancelHandoff(event.reason)), *self._close(event.reason, Refusal.INTERNAL)]

    def _expire(self, event: Silent, now: float) -> list[TargetCommand]:
        """Tell the sender, which may still listen; close, and fail."""
        return [SendDown(CancelHandoff(event.reason)), *self._close(event.reason, Refusal.WORKER_LOST)]

    def _fail(self, event: Closed, now: float) -> list[TargetCommand]:
        """Say that it has failed, now that nothing writes into the blocks any more."""
        if self._has_ended or self._failure is None:
            return []
        self._has_ended = True
        return [self._failure]

    # ---- what they have in common ----

    def _adds_up(self, done: Done) -> bool:
        """Whether the pieces are all that is said to be in the blocks: what did not travel is never believed to be there."""
        cut = self.cut
        match done:
            case SequenceMoved(_, num_computed, num_pieces):
                end = -(-num_computed // cut.layout.block_size)
                return end <= cut.first_block + cut.num_blocks and num_pieces == cut.pieces_before(end)
            case PrefixDone(num_blocks, num_pieces):
                return num_pieces == num_blocks * cut.pieces_per_block
            case PrefillDone():
                return True

    def _connect(self) -> list[TargetCommand]:
        self.is_connecting = True
        assert self.source_layout is not None
        return [Connect(self.offers[0], self.epoch, self.source_layout)]

    def _degrade(self, reason: str, now: float) -> list[TargetCommand]:
        if self.epoch == MAX_DEGRADATIONS:
            return self._take(GaveUp(f"gave up after {MAX_DEGRADATIONS} re-sends: {reason}"), now)
        if len(self.offers) == 1 and self.is_connecting:
            return self._take(GaveUp(reason), now)
        if self.plan is not None:
            sizes = [self.cut.piece_bytes(piece) for piece in range(self.cut.num_pieces)]
            choice = self.plan.after_fault(
                now,
                can_resend=True,
                missing_bytes=sum(size for piece, size in enumerate(sizes) if piece not in self.landed),
                total_bytes=sum(sizes),
                is_computed=self.done is not None,
            )
            if choice.recovery is not Recovery.NEXT_TRANSPORT:
                return self._take(GaveUp(f"{reason}; sending again would take too long"), now)
        if len(self.offers) > 1:
            self.offers.pop(0)
        self.epoch += 1
        return self._connect()

    def _land_if_complete(self, now: float) -> list[TargetCommand]:
        is_receiving = self.state is TransferState.SENDING and not self.is_connecting
        if not is_receiving or self.done is None or self.collecting or self.num_missing > 0:
            return []
        if self.landed and max(self.landed) >= self.done.num_pieces:
            return self._take(GaveUp("the sender announced more pieces than it counts"), now)
        return self._take(Complete(), now)

    def _close(self, reason: str, refusal: Refusal) -> list[TargetCommand]:
        self._failure = Fail(reason, refusal)
        return [CloseInbox()]


_LATE: tuple[Any, ...] = (
    HandoffAccepted, Connected, ConnectFailed, KvPieces, Collected, TransportBroken, PrefillDone, SequenceMoved, PrefixDone,
    HandoffRefused, CancelHandoff, HandoffLost, Due,
)  # fmt: skip
_S = TransferState
TARGET: StateTable[TransferState] = StateTable(
    "the receiving end of a handoff",
    (
        Rule((_S.RESERVED,), (HandoffAccepted,), None, TargetSession._accept),
        Rule(LIVE, (Connected,), None, TargetSession._connected),
        Rule(LIVE, (ConnectFailed,), None, TargetSession._connect_failed),
        Rule(LIVE, (Reached,), _S.SENDING, TargetSession._use),
        Rule((_S.RESERVED,), (KvPieces,), None),
        Rule((_S.SENDING,), (KvPieces,), None, TargetSession._collect),
        Rule((_S.SENDING,), (Collected,), None, TargetSession._collected),
        Rule((_S.SENDING,), (TransportBroken,), None, TargetSession._transport_broke),
        Rule(LIVE, (PrefillDone, SequenceMoved, PrefixDone), None, TargetSession._count),
        Rule(LIVE, (Due,), None, TargetSession._keep_alive),
        Rule((_S.SENDING,), (Complete,), _S.LANDED, TargetSession._land),
        Rule((_S.RESERVED,), (TransportBroken,), _S.FAILED, TargetSession._out_of_turn),
        Rule((_S.SENDING,), (HandoffAccepted,), _S.FAILED, TargetSession._out_of_turn),
        Rule(LIVE, (HandoffRefused,), _S.FAILED, TargetSession._refused),
        Rule(LIVE, (CancelHandoff,), _S.FAILED, TargetSession._cancelled),
        Rule(LIVE, (HandoffLost,), _S.FAILED, TargetSession._broke),
        Rule(LIVE, (GaveUp,), _S.FAILED, TargetSession._give_up),
        Rule(LIVE, (Silent,), _S.EXPIRED, TargetSession._expire),
        Rule((_S.FAILED, _S.EXPIRED), (Closed,), None, TargetSession._fail),
        Rule((_S.LANDED,), (Closed,), None),
        Rule(OVER, _LATE, None),
    ),
)
"""What comes late, after the end, changes nothing, but that what writes into the blocks is waited for."""
