"""The receiving end of one KV handoff as a state machine: events in, commands out; no I/O, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from workers.errors import InvariantViolated, Refusal
from workers.kv_transfer.memory import KvLayout, SharedHandle
from workers.kv_transfer.messages import (
    HEARTBEAT_S,
    HandoffAccepted,
    HandoffDown,
    HandoffRefused,
    KvPiece,
    KvPieces,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    ReleaseHandoff,
    UseTransport,
)
from workers.kv_transfer.pieces import Cut

MAX_DEGRADATIONS = 3
"""How often a transfer may ask for its missing pieces again before it fails."""


class TargetState(Enum):
    OPENING = auto()
    MAPPING = auto()
    RECEIVING = auto()
    LANDED = auto()
    FAILING = auto()
    """Failed or cancelled, but copies into our blocks are still under way."""
    FAILED = auto()


_LEGAL: dict[TargetState, frozenset[TargetState]] = {
    TargetState.OPENING: frozenset({TargetState.MAPPING, TargetState.RECEIVING, TargetState.FAILING}),
    TargetState.MAPPING: frozenset({TargetState.RECEIVING, TargetState.FAILING}),
    TargetState.RECEIVING: frozenset({TargetState.MAPPING, TargetState.LANDED, TargetState.FAILING}),
    TargetState.FAILING: frozenset({TargetState.FAILED}),
    TargetState.LANDED: frozenset(),
    TargetState.FAILED: frozenset(),
}


# ---- events that are not messages of the sender ----


@dataclass(frozen=True, slots=True)
class Mapped:
    """The sender's pool is mapped."""


@dataclass(frozen=True, slots=True)
class MapFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class Copied:
    """Copies that ended: verified pieces and those whose bytes were wrong or unreachable."""

    good: tuple[int, ...]
    bad: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream ended, or the request was cancelled."""

    reason: str
    refusal: Refusal = Refusal.WORKER_LOST


@dataclass(frozen=True, slots=True)
class Tick:
    pass


TargetEvent = HandoffAccepted | KvPieces | PrefillDone | HandoffRefused | Mapped | MapFailed | Copied | Broken | Tick


# ---- commands ----


@dataclass(frozen=True, slots=True)
class Send:
    message: HandoffDown


@dataclass(frozen=True, slots=True)
class MapPool:
    handle: SharedHandle
    layout: KvLayout


@dataclass(frozen=True, slots=True)
class CopyPieces:
    """Put these pieces in place and verify their checksums; answer with Copied."""

    pieces: tuple[KvPiece, ...]
    transport: str


@dataclass(frozen=True, slots=True)
class Land:
    done: PrefillDone


@dataclass(frozen=True, slots=True)
class Fail:
    """The transfer is over and nothing writes into its blocks any more."""

    reason: str
    refusal: Refusal


TargetCommand = Send | MapPool | CopyPieces | Land | Fail


@dataclass(slots=True)
class TargetSession:
    """Asks, negotiates, copies, verifies, acknowledges; over when it returns Land or Fail, which it does exactly once.

    Silence of the sender for `timeout_s` fails it. A piece that does not verify makes it degrade: the missing pieces are asked
    for again over the next transport both sides have (the last one is kept), at most MAX_DEGRADATIONS times.
    """

    cut: Cut
    opening: OpenHandoff
    timeout_s: float
    state: TargetState = TargetState.OPENING
    transports: list[str] = field(default_factory=list)
    done: PrefillDone | None = None
    num_degradations: int = 0
    landed: set[int] = field(default_factory=set)
    copying: set[int] = field(default_factory=set)
    _accepted: HandoffAccepted | None = None
    _failure: Fail | None = None
    _heard_s: float = 0.0
    _spoke_s: float = 0.0

    @property
    def transport(self) -> str:
        return self.transports[0] if self.transports else ""

    @property
    def is_over(self) -> bool:
        return self.state in (TargetState.LANDED, TargetState.FAILED)

    def open(self, now: float) -> list[TargetCommand]:
        """The first command; call once."""
        self._heard_s = self._spoke_s = now
        return [Send(self.opening)]

    def handle(self, event: TargetEvent, now: float) -> list[TargetCommand]:
        """Commands in the order they are to be executed. Events after the end are ignored."""
        if self.is_over:
            return []
        if isinstance(event, HandoffAccepted | KvPieces | PrefillDone | HandoffRefused):
            self._heard_s = now
        match event:
            case Copied():
                return self._on_copied(event)
            case Tick():
                return self._on_tick(now)
            case _ if self.state is TargetState.FAILING:
                return []
            case HandoffAccepted():
                return self._on_accepted(event)
            case Mapped():
                return self._receive()
            case MapFailed():
                return self._degrade(event.reason)
            case KvPieces():
                return self._on_pieces(event)
            case PrefillDone():
                return self._on_done(event)
            case HandoffRefused():
                return self._fail(event.message, event.refusal)
            case Broken():
                return self._fail(event.reason, event.refusal)

    def _move(self, state: TargetState) -> None:
        if state not in _LEGAL[self.state]:
            raise InvariantViolated(f"a transfer cannot go from {self.state.name} to {state.name}")
        self.state = state

    def _on_accepted(self, event: HandoffAccepted) -> list[TargetCommand]:
        if self.state is not TargetState.OPENING:
            return self._fail("the sender accepted twice", Refusal.INTERNAL)
        mine = self.opening.transports
        self.transports = [t for t in mine if t in event.transports and (t != "shm" or event.shared is not None)]
        self._accepted = event
        if not self.transports:
            return self._fail(f"no common transport: {mine} here, {event.transports} there", Refusal.INTERNAL)
        return self._start_transport()

    def _start_transport(self) -> list[TargetCommand]:
        assert self._accepted is not None
        if self.transport == "shm" and self._accepted.shared is not None:
            self._move(TargetState.MAPPING)
            return [MapPool(self._accepted.shared, self._accepted.layout)]
        if self.state is not TargetState.RECEIVING:
            self._move(TargetState.RECEIVING)
        return [Send(UseTransport(self.transport))]

    def _receive(self) -> list[TargetCommand]:
        self._move(TargetState.RECEIVING)
        return [Send(UseTransport(self.transport))]

    def _degrade(self, reason: str) -> list[TargetCommand]:
        self.num_degradations += 1
        if self.num_degradations > MAX_DEGRADATIONS:
            return self._fail(f"gave up after {MAX_DEGRADATIONS} re-sends: {reason}", Refusal.INTERNAL)
        if len(self.transports) > 1:
            self.transports.pop(0)
        elif self.state is TargetState.MAPPING:
            return self._fail(reason, Refusal.INTERNAL)
        return self._start_transport()

    def _on_pieces(self, event: KvPieces) -> list[TargetCommand]:
        fresh: list[KvPiece] = []
        for piece in event.pieces:
            try:
                slot = self.cut.slot(piece.piece)
            except IndexError as error:
                return self._fail(str(error), Refusal.INTERNAL)
            if (slot.block, slot.first_layer, slot.num_layers) != (piece.block, piece.first_layer, piece.num_layers):
                return self._fail(f"piece {piece.piece} names another place than the layout", Refusal.INTERNAL)
            # What the sender announced before it heard of a new transport comes again over that one.
            is_late = bool(piece.data) is (self.transport == "shm")
            if not is_late and piece.piece not in self.landed and piece.piece not in self.copying:
                fresh.append(piece)
        if not fresh or self.state is not TargetState.RECEIVING:
            return []
        self.copying.update(piece.piece for piece in fresh)
        return [CopyPieces(tuple(fresh), self.transport)]

    def _on_copied(self, event: Copied) -> list[TargetCommand]:
        self.copying.difference_update(event.good, event.bad)
        self.landed.update(event.good)
        if self.state is TargetState.FAILING:
            return self._settle()
        commands: list[TargetCommand] = [Send(PieceAck(event.good))] if event.good else []
        if event.bad and self.state is TargetState.RECEIVING:
            commands += self._degrade(event.reason)
        return commands + self._maybe_land()

    def _on_done(self, event: PrefillDone) -> list[TargetCommand]:
        if event.num_pieces != self.cut.num_pieces:
            return self._fail(
                f"the sender counts {event.num_pieces} pieces, we count {self.cut.num_pieces}", Refusal.INTERNAL
            )
        self.done = event
        return self._maybe_land()

    def _maybe_land(self) -> list[TargetCommand]:
        if self.state is not TargetState.RECEIVING or self.done is None or len(self.landed) < self.cut.num_pieces:
            return []
        self._move(TargetState.LANDED)
        return [Land(self.done), Send(ReleaseHandoff())]

    def _on_tick(self, now: float) -> list[TargetCommand]:
        if self.state is TargetState.FAILING:
            return self._settle()
        if now - self._heard_s > self.timeout_s:
            return self._fail(f"the sender has been silent for {self.timeout_s:g} s", Refusal.WORKER_LOST)
        if now - self._spoke_s >= HEARTBEAT_S:
            self._spoke_s = now
            return [Send(PieceAck())]
        return []

    def _fail(self, reason: str, refusal: Refusal) -> list[TargetCommand]:
        self._failure = Fail(reason, refusal)
        self._move(TargetState.FAILING)
        return self._settle()

    def _settle(self) -> list[TargetCommand]:
        if self.copying or self._failure is None:
            return []
        self._move(TargetState.FAILED)
        return [self._failure]
