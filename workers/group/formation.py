"""Decides when the ranks of a group form an epoch, when it is over, and what was lost with it; pure: no socket, no clock, no thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from workers.state_table import Rule, StateTable


class State(Enum):
    GATHERING = auto()
    """Some rank is missing, loading, or still leaving the last epoch."""
    FORMING = auto()
    """All ranks meet in the store."""
    SERVING = auto()
    """Steps run."""


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


class Turn(Enum):
    """What the events amount to."""

    ALL_READY = auto()
    """Every rank is there and idle."""
    ALL_FORMED = auto()
    """Every rank has met the others."""
    BREAK = auto()
    """A rank is lost, or its part has failed or takes too long."""


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
                is_whole = self.state is State.GATHERING and len(self.ready) >= self.size
                return self._take(Turn.ALL_READY, now) if is_whole else []
            case HasFormed(rank, epoch):
                return self._has_formed(rank, epoch, now)
            case Broke(_, epoch, message):
                return self._take(Turn.BREAK, now, message) if epoch == self.epoch else []
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

    def _take(self, turn: Turn, now: float, message: str = "") -> list[Command]:
        step = FORMATION.step(self.state, turn)
        if step.to is not self.state:
            self.state, self._since_s = step.to, now
        commands: list[Command] = step.action(self, message) if step.action else []
        return commands

    def _form(self, message: str) -> list[Command]:
        """Have all ranks meet in the next epoch."""
        self.epoch += 1
        self.ready.clear()
        self._formed.clear()
        self._computing.clear()
        return [FormEpoch(self.epoch)]

    def _serve(self, message: str) -> list[Command]:
        """Steps may run."""
        return [Serve(self.epoch)]

    def _abort(self, message: str) -> list[Command]:
        """Have all ranks leave the epoch."""
        return [AbortEpoch(self.epoch, message)]

    def _has_formed(self, rank: int, epoch: int, now: float) -> list[Command]:
        if self.state is not State.FORMING or epoch != self.epoch:
            return []
        self._formed.add(rank)
        return self._take(Turn.ALL_FORMED, now) if len(self._formed) == self.size else []

    def _lose(self, rank: int, reason: str, now: float) -> list[Command]:
        self.members.discard(rank)
        self.ready.discard(rank)
        self.lost_pools.add(rank // self.tensor)
        return [ReportLost(rank, reason), *self._take(Turn.BREAK, now, f"rank {rank} is lost: {reason}")]

    def _look(self, now: float) -> list[Command]:
        elapsed = now - self._since_s
        if self.state is State.FORMING and elapsed > self.form_timeout_s:
            return self._take(Turn.BREAK, now, f"the ranks did not meet within {self.form_timeout_s} s")
        if self.state is State.SERVING and self._computing and elapsed > self.step_timeout_s:
            # its peers wait for it and are late too: only one that has not even failed when the epoch ends is at fault
            return self._take(Turn.BREAK, now, f"step {self._step} did not end within {self.step_timeout_s} s")
        if self.state is State.GATHERING and self.epoch and elapsed > self.step_timeout_s:
            stuck = sorted(self._computing & self.members - self.ready - {0})
            self._computing -= set(stuck)
            return [Expel(rank, f"it did not leave epoch {self.epoch}") for rank in stuck]
        return []


FORMATION: StateTable[State] = StateTable(
    "a group of ranks",
    (
        Rule((State.GATHERING,), (Turn.ALL_READY,), State.FORMING, Formation._form),
        Rule((State.FORMING,), (Turn.ALL_FORMED,), State.SERVING, Formation._serve),
        Rule((State.FORMING, State.SERVING), (Turn.BREAK,), State.GATHERING, Formation._abort),
        Rule((State.GATHERING,), (Turn.BREAK,), None),
    ),
)
