"""Decides when the ranks of a group form an epoch, when it is over, and what was lost with it; pure: no socket, no clock, no thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from workers.errors import InvariantViolated


class State(Enum):
    GATHERING = auto()
    """Some rank is missing, loading, or still leaving the last epoch."""
    FORMING = auto()
    """All ranks meet in the store."""
    SERVING = auto()
    """Steps run."""


_LEGAL: dict[State, frozenset[State]] = {
    State.GATHERING: frozenset({State.FORMING}),
    State.FORMING: frozenset({State.SERVING, State.GATHERING}),
    State.SERVING: frozenset({State.GATHERING}),
}


@dataclass(frozen=True, slots=True)
class Joined:
    """A rank has connected. If it was a member already, its former self is gone."""

    rank: int


@dataclass(frozen=True, slots=True)
class BecameReady:
    rank: int


@dataclass(frozen=True, slots=True)
class HasFormed:
    rank: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Broke:
    """A rank's part of an epoch has failed; the rank itself lives."""

    rank: int
    epoch: int
    message: str


@dataclass(frozen=True, slots=True)
class Gone:
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepBegan:
    """Every rank was given step `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class StepEnded:
    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = Joined | BecameReady | HasFormed | Broke | Gone | StepBegan | StepEnded | Tick


@dataclass(frozen=True, slots=True)
class FormEpoch:
    epoch: int


@dataclass(frozen=True, slots=True)
class AbortEpoch:
    epoch: int
    message: str


@dataclass(frozen=True, slots=True)
class Serve:
    epoch: int


@dataclass(frozen=True, slots=True)
class ReportLost:
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Expel:
    """End the connection of a rank that lives but does not do its part."""

    rank: int
    reason: str


Command = FormEpoch | AbortEpoch | Serve | ReportLost | Expel


@dataclass(slots=True)
class Formation:
    """Progress of a group of `size` ranks, `tensor` of which share a pool. Its owner serializes the calls of `handle`."""

    size: int
    tensor: int
    form_timeout_s: float
    step_timeout_s: float
    state: State = State.GATHERING
    epoch: int = 0
    members: set[int] = field(default_factory=set)
    ready: set[int] = field(default_factory=set)
    """Members that are idle between epochs."""
    lost_pools: set[int] = field(default_factory=set)
    """Pools that lost a rank, and with it KV, since somebody asked."""
    _formed: set[int] = field(default_factory=set)
    _computing: set[int] = field(default_factory=set)
    _step: int = 0
    _since_s: float = 0.0
    """When the state, or the step, began."""

    def handle(self, event: Event, now: float) -> list[Command]:
        match event:
            case Joined(rank):
                gone = self._lose(rank, "it came back as another process", now) if rank in self.members else []
                self.members.add(rank)
                return gone
            case BecameReady(rank):
                if rank in self.members:
                    self.ready.add(rank)
                return self._form(now)
            case HasFormed(rank, epoch):
                return self._has_formed(rank, epoch, now)
            case Broke(_, epoch, message):
                return self._break(message, now) if epoch == self.epoch else []
            case Gone(rank, reason):
                return self._lose(rank, reason, now) if rank in self.members else []
            case StepBegan(number):
                self._step, self._computing, self._since_s = number, set(range(self.size)), now
                return []
            case StepEnded(rank, number):
                if number == self._step:
                    self._computing.discard(rank)
                return []
            case Tick():
                return self._look(now)

    def take_lost_pools(self) -> tuple[int, ...]:
        lost = tuple(sorted(self.lost_pools))
        self.lost_pools.clear()
        return lost

    def _form(self, now: float) -> list[Command]:
        if self.state is not State.GATHERING or len(self.ready) < self.size:
            return []
        self._move(State.FORMING, now)
        self.epoch += 1
        self.ready.clear()
        self._formed.clear()
        self._computing.clear()
        return [FormEpoch(self.epoch)]

    def _has_formed(self, rank: int, epoch: int, now: float) -> list[Command]:
        if self.state is not State.FORMING or epoch != self.epoch:
            return []
        self._formed.add(rank)
        if len(self._formed) < self.size:
            return []
        self._move(State.SERVING, now)
        return [Serve(epoch)]

    def _break(self, message: str, now: float) -> list[Command]:
        if self.state is State.GATHERING:
            return []
        self._move(State.GATHERING, now)
        return [AbortEpoch(self.epoch, message)]

    def _lose(self, rank: int, reason: str, now: float) -> list[Command]:
        self.members.discard(rank)
        self.ready.discard(rank)
        self.lost_pools.add(rank // self.tensor)
        return [ReportLost(rank, reason), *self._break(f"rank {rank} is lost: {reason}", now)]

    def _look(self, now: float) -> list[Command]:
        elapsed = now - self._since_s
        if self.state is State.FORMING and elapsed > self.form_timeout_s:
            return self._break(f"the ranks did not meet within {self.form_timeout_s} s", now)
        if self.state is State.SERVING and self._computing and elapsed > self.step_timeout_s:
            # its peers wait for it and are late too: only one that has not even failed when the epoch ends is at fault
            return self._break(f"step {self._step} did not end within {self.step_timeout_s} s", now)
        if self.state is State.GATHERING and self.epoch and elapsed > self.step_timeout_s:
            stuck = sorted(self._computing & self.members - self.ready - {0})
            self._computing -= set(stuck)
            return [Expel(rank, f"it did not leave epoch {self.epoch}") for rank in stuck]
        return []

    def _move(self, state: State, now: float) -> None:
        if state not in _LEGAL[self.state]:
            raise InvariantViolated(f"a group cannot go from {self.state.name} to {state.name}")
        self.state = state
        self._since_s = now
