"""The sending end of one KV handoff as a state machine: events in, commands out; no I/O, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from workers.errors import InvariantViolated
from workers.kv_transfer.messages import (
    HEARTBEAT_S,
    HandoffAccepted,
    HandoffUp,
    KvPieces,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    ReleaseHandoff,
    UseTransport,
)
from workers.kv_transfer.pieces import Cut


class SourceState(Enum):
    ACCEPTED = auto()
    SENDING = auto()
    RELEASED = auto()
    FAILED = auto()


_LEGAL: dict[SourceState, frozenset[SourceState]] = {
    SourceState.ACCEPTED: frozenset({SourceState.SENDING, SourceState.FAILED}),
    SourceState.SENDING: frozenset({SourceState.RELEASED, SourceState.FAILED}),
    SourceState.RELEASED: frozenset(),
    SourceState.FAILED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Filled:
    """The first `num_filled` entries of the block table `blocks` are complete."""

    blocks: tuple[int, ...]
    num_filled: int


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream ended, or the engine gave the prompt up."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    pass


SourceEvent = UseTransport | PieceAck | ReleaseHandoff | OpenHandoff | Filled | PrefillDone | Broken | Tick


@dataclass(frozen=True, slots=True)
class StartPrefill:
    pass


@dataclass(frozen=True, slots=True)
class Send:
    message: HandoffUp


@dataclass(frozen=True, slots=True)
class SendPieces:
    """Announce these (piece number, pool block) pairs; with `with_data` their bytes travel in the message."""

    pieces: tuple[tuple[int, int], ...]
    with_data: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Over: the blocks are not needed any more. `reason` is empty when everything landed."""

    reason: str = ""


SourceCommand = StartPrefill | Send | SendPieces | Release


@dataclass(slots=True)
class SourceSession:
    """Announces pieces as blocks fill, keeps at most `window_bytes` unacknowledged, and holds the blocks until told to release.

    Silence of the receiver for `timeout_s` frees everything.
    """

    cut: Cut
    accepted: HandoffAccepted
    timeout_s: float
    window_bytes: int
    state: SourceState = SourceState.ACCEPTED
    transport: str = ""
    blocks: tuple[int, ...] = ()
    num_filled: int = 0
    acknowledged: set[int] = field(default_factory=set)
    _next: int = 0
    _in_flight: dict[int, int] = field(default_factory=dict)
    _again: list[int] = field(default_factory=list)
    _heard_s: float = 0.0
    _spoke_s: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.state in (SourceState.RELEASED, SourceState.FAILED)

    def open(self, now: float) -> list[SourceCommand]:
        """The first commands; call once."""
        self._heard_s = self._spoke_s = now
        return [Send(self.accepted), StartPrefill()]

    def handle(self, event: SourceEvent, now: float) -> list[SourceCommand]:
        """Commands in the order they are to be executed. Events after the end are ignored."""
        if self.is_over:
            return []
        if isinstance(event, UseTransport | PieceAck | ReleaseHandoff):
            self._heard_s = now
        match event:
            case UseTransport():
                return self._on_use(event)
            case PieceAck():
                for piece in event.pieces:
                    if self._in_flight.pop(piece, None) is not None:
                        self.acknowledged.add(piece)
                return self._pump()
            case Filled():
                self.blocks, self.num_filled = event.blocks, event.num_filled
                return self._pump()
            case PrefillDone():
                return [Send(event)]
            case ReleaseHandoff():
                return self._end(SourceState.RELEASED, "")
            case OpenHandoff():
                return self._end(SourceState.FAILED, "the receiver opened the transfer twice")
            case Broken():
                return self._end(SourceState.FAILED, event.reason)
            case Tick():
                return self._on_tick(now)

    def _on_use(self, event: UseTransport) -> list[SourceCommand]:
        if event.transport not in self.accepted.transports:
            return self._end(SourceState.FAILED, f"the receiver chose {event.transport!r}, which was not offered")
        if self.state is SourceState.ACCEPTED:
            self._move(SourceState.SENDING)
        self.transport = event.transport
        self._again = sorted(self._in_flight)
        self._in_flight.clear()
        return self._pump()

    def _pump(self) -> list[SourceCommand]:
        """Announces what is complete, as far as the window allows; re-sends come first."""
        if self.state is not SourceState.SENDING:
            return []
        ready = self.cut.pieces_before(self.num_filled)
        room = self.window_bytes - sum(self._in_flight.values())
        batch: list[tuple[int, int]] = []
        while room > 0 and (self._again or self._next < ready):
            piece = self._again.pop(0) if self._again else self._next
            if piece == self._next:
                self._next += 1
            if piece in self.acknowledged:
                continue
            size = self.cut.piece_bytes(piece)
            room -= size
            self._in_flight[piece] = size
            batch.append((piece, self.blocks[self.cut.slot(piece).block]))
        return [SendPieces(tuple(batch), with_data=self.transport != "shm")] if batch else []

    def _on_tick(self, now: float) -> list[SourceCommand]:
        if now - self._heard_s > self.timeout_s:
            return self._end(SourceState.FAILED, f"the receiver has been silent for {self.timeout_s:g} s")
        if now - self._spoke_s >= HEARTBEAT_S:
            self._spoke_s = now
            return [Send(KvPieces())]
        return []

    def _end(self, state: SourceState, reason: str) -> list[SourceCommand]:
        if state is SourceState.RELEASED and self.state is SourceState.ACCEPTED:
            state, reason = SourceState.FAILED, "the receiver released a transfer that never started"
        self._move(state)
        return [Release(reason)]

    def _move(self, state: SourceState) -> None:
        if state not in _LEGAL[self.state]:
            raise InvariantViolated(f"a transfer cannot go from {self.state.name} to {state.name}")
        self.state = state
