"""One worker's switch as a state machine, from what is intended to done or undone. Judges by what the worker reports; does nothing itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

from router.fleet.seen import WorkerSeen
from workers.state_table import Rule, StateTable
from workers.status import Role


class Phase(StrEnum):
    """In the store the phase is written before what belongs to it is done, so that whoever leads next can go on."""

    INTENDED = "intended"
    DRAINING = "draining"
    FENCING = "fencing"
    VERIFYING = "verifying"
    UNDOING = "undoing"
    DONE = "done"
    ROLLED_BACK = "rolled_back"


class Turn(Enum):
    """What is found when a switch is looked at."""

    MUST_MOVE = auto()
    MAY_FENCE = auto()
    KEEPS_ROLE = auto()
    EMPTY = auto()
    FENCED = auto()
    SERVES = auto()
    LATE = auto()
    LATE_ORDER = auto()
    RESTORED = auto()
    REFUSED = auto()


class Effect(StrEnum):
    """What is done on entering a phase, and again until it shows."""

    DRAIN = "Have the worker take no new work, so that routers move what runs there"
    FENCE = "Have the worker take the role, and with it a new generation, from the generation that was intended for"
    SERVE = "Have the worker take work again, or none where it is to be drained"
    RESTORE = "Have the worker take its former role, and work again"


SWITCH = StateTable(
    "a switch of roles",
    (
        Rule((Phase.INTENDED,), (Turn.MUST_MOVE,), Phase.DRAINING, Effect.DRAIN),
        Rule((Phase.INTENDED,), (Turn.MAY_FENCE,), Phase.FENCING, Effect.FENCE),
        Rule((Phase.INTENDED,), (Turn.KEEPS_ROLE,), Phase.VERIFYING, Effect.SERVE),
        Rule((Phase.INTENDED,), (Turn.REFUSED, Turn.LATE, Turn.LATE_ORDER), Phase.ROLLED_BACK),
        Rule((Phase.DRAINING,), (Turn.EMPTY, Turn.LATE_ORDER), Phase.FENCING, Effect.FENCE),
        Rule((Phase.FENCING,), (Turn.FENCED,), Phase.VERIFYING, Effect.SERVE),
        Rule((Phase.VERIFYING,), (Turn.SERVES,), Phase.DONE),
        Rule((Phase.DRAINING,), (Turn.LATE, Turn.REFUSED), Phase.UNDOING, Effect.RESTORE),
        Rule((Phase.FENCING, Phase.VERIFYING), (Turn.LATE, Turn.LATE_ORDER), Phase.UNDOING, Effect.RESTORE),
        Rule((Phase.UNDOING,), (Turn.RESTORED, Turn.LATE, Turn.LATE_ORDER), Phase.ROLLED_BACK),
    ),
)
EFFECTS = {
    Phase.DRAINING: Effect.DRAIN,
    Phase.FENCING: Effect.FENCE,
    Phase.VERIFYING: Effect.SERVE,
    Phase.UNDOING: Effect.RESTORE,
}
"""What a new leader does again for a switch that it finds in a phase."""

CONTROLLER, OPERATOR = "controller", "operator"


@dataclass(frozen=True, slots=True)
class RoleSwitch:
    """One switch as the store has it. A worker has one at a time."""

    number: str
    """Unique in the cluster's life."""
    worker_id: str
    source: Role
    target: Role
    generation: int
    """In which the worker was when it was intended: a role is taken from that one, or not at all."""
    reason: str
    by: str = CONTROLLER
    is_drained: bool = False
    """It is to take no new work afterwards either."""
    was_drained: bool = False
    """It took none before."""
    force: bool = False
    phase: Phase = Phase.INTENDED
    drained_here: bool = False
    """This switch has had it take no new work, and it is not known to take work again."""
    why: str = ""
    """It was rolled back."""
    at_s: float = 0.0
    """Since 1970: when the phase began."""

    @property
    def is_over(self) -> bool:
        return SWITCH.is_final(self.phase)

    @property
    def must_move(self) -> bool:
        """What decodes there cannot stay in the new role."""
        return self.source.can_decode and not self.target.can_decode

    def rests(self, wall_s: float, rest_s: float) -> bool:
        """It ended less than `rest_s` ago. Another host may have said when: one whose clock is far ahead adds no more than as much again."""
        return self.is_over and abs(wall_s - self.at_s) < rest_s

    def entered(self, phase: Phase, turn: Turn, at_s: float, why: str = "") -> RoleSwitch:
        """The same switch in its next phase."""
        is_seen = turn in (Turn.SERVES, Turn.RESTORED)
        drained = (self.drained_here or phase is Phase.DRAINING) and not is_seen
        return replace(self, phase=phase, at_s=at_s, why=why or self.why, drained_here=drained)


def judge(switch: RoleSwitch, worker: WorkerSeen | None, is_safe: bool, is_late: bool) -> Turn | None:
    """What is found; None: nothing yet. `is_safe`: without this worker the others can do both. `worker` None: it is no member."""
    late = Turn.LATE_ORDER if switch.by == OPERATOR else Turn.LATE
    match switch.phase:
        case Phase.INTENDED:
            turn = _begin(switch, worker, is_safe)
        case Phase.DRAINING:
            turn = _drained(switch, worker, is_safe)
        case Phase.FENCING:
            is_there = worker is not None and worker.role is switch.target and worker.generation > switch.generation
            turn = Turn.FENCED if is_there else None
        case Phase.VERIFYING:
            turn = Turn.SERVES if worker is not None and _serves(switch, worker) else None
        case Phase.UNDOING:
            turn = Turn.RESTORED if worker is None or _is_restored(switch, worker) else None
        case _:
            return None
    return turn if turn is not None or not is_late else late


def _begin(switch: RoleSwitch, worker: WorkerSeen | None, is_safe: bool) -> Turn | None:
    if worker is None or not worker.is_up or worker.is_rebuilding:
        return None
    if not is_safe and not switch.force:
        return Turn.REFUSED
    if switch.target is switch.source:
        return Turn.KEEPS_ROLE
    is_idle = not worker.num_sequences
    return Turn.MAY_FENCE if is_idle or not switch.must_move else Turn.MUST_MOVE


def _drained(switch: RoleSwitch, worker: WorkerSeen | None, is_safe: bool) -> Turn | None:
    if worker is None or not worker.is_up:
        return None
    if not is_safe and not switch.force:
        return Turn.REFUSED  # the last of the others has gone
    return Turn.EMPTY if worker.is_draining and not worker.num_sequences else None


def _serves(switch: RoleSwitch, worker: WorkerSeen) -> bool:
    return (
        worker.is_up
        and not worker.is_rebuilding
        and worker.role is switch.target
        and worker.is_draining is switch.is_drained
    )


def _is_restored(switch: RoleSwitch, worker: WorkerSeen) -> bool:
    return worker.is_up and worker.role is switch.source and worker.is_draining is switch.was_drained


def why_of(turn: Turn, switch: RoleSwitch) -> str:
    """Why a switch is rolled back, in words."""
    if turn is Turn.REFUSED:
        work = "decode" if switch.source.can_decode and not switch.target.can_decode else "prefill"
        if switch.is_drained:
            return f"no worker could prefill or decode if {switch.worker_id!r} were drained; use force to do it"
        return f"no worker could {work} if {switch.worker_id!r} became {switch.target}; use force to do it"
    return {
        Phase.INTENDED: "the worker was not there",
        Phase.DRAINING: "what ran there did not move away or end in time",
        Phase.FENCING: "the worker did not take the role in time",
        Phase.VERIFYING: "the worker did not take work in time",
        Phase.UNDOING: "the worker was lost meanwhile",
    }.get(switch.phase, "")
