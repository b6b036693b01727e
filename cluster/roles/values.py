"""What the role controller sees and says, as plain values: splits, moves, observations, decisions. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from router.fleet.seen import WorkerSeen
from router.requests.demand import DemandReport
from workers.status import Role


class RoleSplit(NamedTuple):
    """Workers of each role."""

    prefill: int
    decode: int
    mixed: int

    @property
    def size(self) -> int:
        return self.prefill + self.decode + self.mixed

    def __str__(self) -> str:
        return f"{self.prefill}P {self.decode}D {self.mixed}M"


def split_of(roles: Iterable[Role]) -> RoleSplit:
    counts = {role: 0 for role in Role}
    for role in roles:
        counts[role] += 1
    return RoleSplit(counts[Role.PREFILL], counts[Role.DECODE], counts[Role.MIXED])


@dataclass(frozen=True, slots=True)
class Move:
    """One worker's switch."""

    worker_id: str
    source: Role
    target: Role


@dataclass(frozen=True, slots=True)
class Observation:
    """The cluster at the time `at_s`, on the clock of whoever decides. `switching`: roles that workers are on their way to."""

    at_s: float
    workers: tuple[WorkerSeen, ...]
    demands: tuple[DemandReport, ...]
    """Of all routers."""
    pinned: frozenset[str] = frozenset()
    resting: frozenset[str] = frozenset()
    """Workers that must not be switched now."""
    switching: Mapping[str, Role] = field(default_factory=dict)
    handoff_s: float = 0.0
    """What moving a prompt's KV adds to a first token."""


CLEAR_S = 8.0
"""What waits now is to be served within this time, beside what comes."""
LONGEST_CLEAR_S = 60.0
"""The same of so much that it would be more than what comes: most of that is late whatever is done, and roles are for what can be in time."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the next minute is expected to ask, over all routers."""

    requests_per_s: float = 0.0
    prompt_tokens: float = 0.0
    """Mean, cached parts included."""
    uncached: tuple[float, ...] = ()
    """Points of the distribution of prompt tokens that have to be computed."""
    output_tokens: float = 0.0
    backlog_tokens: float = 0.0
    """Prompt tokens that wait, at routers and at workers."""
    num_sequences: int = 0
    """That decode soon, if what decodes now goes on growing."""
    context_tokens: float = 0.0
    """Of each of those that decode now, on average."""
    ttft_attainment: float = 1.0
    """Measured: the share of first tokens within the target, lately."""
    tpot_attainment: float = 1.0

    @property
    def asked_per_s(self) -> float:
        """Requests a second that are to be served: those that come, and what waits within CLEAR_S, or as many again."""
        mean = sum(self.uncached) / len(self.uncached) if self.uncached else 0.0
        waiting = self.backlog_tokens / mean if mean else 0.0
        return self.requests_per_s + min(waiting / CLEAR_S, max(self.requests_per_s, waiting / LONGEST_CLEAR_S))


@dataclass(frozen=True, slots=True)
class Alternative:
    """A split and the good requests a second that it is expected to bring."""

    split: RoleSplit
    goodput: float


@dataclass(frozen=True, slots=True)
class Effect:
    """What was measured some time after a decision, beside what had been measured at it."""

    ttft_before: float
    ttft_after: float
    tpot_before: float
    tpot_after: float
    finished_before: float
    """Answers a second."""
    finished_after: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What shall change, and why. `moves` empty: nothing, and `reason` says why not."""

    number: int
    moves: tuple[Move, ...]
    reason: str
    now: Alternative
    best: Alternative
    alternatives: tuple[Alternative, ...]
    """The best few others."""
    forecast: Forecast
    desired_workers: int
    effect: Effect | None = None

    @property
    def gain(self) -> float:
        """Good requests a second more than with the roles as they were."""
        return self.best.goodput - self.now.goodput
