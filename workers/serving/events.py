"""The values that go into the worker core (events) and come out of it (commands).

A `session` numbers one router's stream, a `transfer` one handoff that is served to another worker: the core knows both by
number, and what is said of a number that has ended changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.messages import EngineCommand, LayersFilled, Report
from workers.errors import Refusal
from workers.handoff.protocol.choices import Plan
from workers.handoff.protocol.messages import Done, Handoff, HandoffFailed, OpenHandoff, Subject
from workers.handoff.protocol.source_session import Filled, HandoffBroken
from workers.status import Role, WorkerAddress
from workers.wire.attach import RouterMessage, WorkerFrame

# ---- events ----


@dataclass(frozen=True, slots=True)
class RouterAttached:
    """A router's stream has begun, and it has said who it is."""

    session: int
    router_id: str


@dataclass(frozen=True, slots=True)
class RouterSaid:
    """A message came down a router's stream."""

    session: int
    message: RouterMessage


@dataclass(frozen=True, slots=True)
class FrameWanted:
    """The router's stream can take a frame: the one before, if there was one, has been written. One WriteFrame follows, now or later."""

    session: int


@dataclass(frozen=True, slots=True)
class RouterLeft:
    """The router says no more, and still reads: the stream ends with what is still to be said."""

    session: int


@dataclass(frozen=True, slots=True)
class RouterLost:
    """The stream is gone."""

    session: int


@dataclass(frozen=True, slots=True)
class StepReported:
    """What the engine thread says after a step."""

    report: Report


@dataclass(frozen=True, slots=True)
class NotAdded:
    """The engine thread did not take a sequence: too many commands wait for it."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class LayersReported:
    """What the engine thread says in mid-step."""

    layers: LayersFilled


@dataclass(frozen=True, slots=True)
class HandoffAsked:
    """Another worker asks for something: answered by AcceptHandoff or RefuseHandoff. `generation` is the asker's as its envelope says."""

    transfer: int
    opening: OpenHandoff
    generation: int


@dataclass(frozen=True, slots=True)
class HandoffBegun:
    """The receiver is connected to: fill the transfer."""

    transfer: int


@dataclass(frozen=True, slots=True)
class HandoffAcknowledged:
    """So many pieces are in place and verified at the receiver. Told of paced handoffs only."""

    transfer: int
    num_pieces: int


@dataclass(frozen=True, slots=True)
class HandoffReleased:
    """Nobody reads the blocks for this transfer any more. `reason` is empty when the receiver has everything."""

    transfer: int
    reason: str


@dataclass(frozen=True, slots=True)
class HandoffEnded:
    """A Receive is over, and nothing writes into the blocks any more. None: it was stopped, or broke in a way nobody expected."""

    sequence_id: int
    outcome: Handoff | HandoffFailed | None


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """By the operator, who has named the right generation."""

    role: Role


@dataclass(frozen=True, slots=True)
class SetDrain:
    """From now on no new work is taken, or it is again. `remember`: the worker's owner is to know, so that a restart does not undo it."""

    is_draining: bool
    remember: bool = True


@dataclass(frozen=True, slots=True)
class Suspend:
    """A rank is lost: nothing runs here until `Resumed`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """All ranks are there again."""


@dataclass(frozen=True, slots=True)
class Close:
    """The worker stops."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: at `next_due_s`, or at any other moment."""


Event = (
    RouterAttached
    | RouterSaid
    | FrameWanted
    | RouterLeft
    | RouterLost
    | StepReported
    | NotAdded
    | LayersReported
    | HandoffAsked
    | HandoffBegun
    | HandoffAcknowledged
    | HandoffReleased
    | HandoffEnded
    | SwitchRole
    | SetDrain
    | Suspend
    | Resumed
    | Close
    | Tick
)

# ---- commands ----


@dataclass(frozen=True, slots=True)
class Post:
    """Tell the engine thread."""

    command: EngineCommand


@dataclass(frozen=True, slots=True)
class WriteFrame:
    """Write this to the router's stream, then say FrameWanted."""

    session: int
    frame: WorkerFrame


@dataclass(frozen=True, slots=True)
class EndStream:
    """Everything has been written: the stream ends well."""

    session: int


@dataclass(frozen=True, slots=True)
class CutStream:
    """The router does not keep up, or has another stream by now: this one ends at once, also in the middle of a write. RouterLost
    follows."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class AcceptHandoff:
    """Serve it. `is_paced`: what goes on here depends on how far the receiver is."""

    transfer: int
    is_paced: bool


@dataclass(frozen=True, slots=True)
class RefuseHandoff:
    transfer: int
    refusal: Refusal
    message: str


@dataclass(frozen=True, slots=True)
class Feed:
    """Tell the sending end of a handoff what has filled, that all is done, or that it is given up."""

    transfer: int
    event: Filled | Done | HandoffBroken


@dataclass(frozen=True, slots=True)
class FailHandoffs:
    """Give up everything that is handed over from here."""

    reason: str


@dataclass(frozen=True, slots=True)
class Receive:
    """Have `source` fill the entries from `first_block` on of the block table `blocks`; HandoffEnded says what became of it.

    `patience_s` None: as long as it makes progress.
    """

    sequence_id: int
    source: WorkerAddress
    subject: Subject
    first_block: int
    blocks: tuple[int, ...]
    plan: Plan | None = None
    patience_s: float | None = None


@dataclass(frozen=True, slots=True)
class StopReceiving:
    """End the Receive of this sequence; HandoffEnded follows all the same."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class TellRole:
    """The worker's owner is to know role and generation."""

    role: Role
    generation: int


@dataclass(frozen=True, slots=True)
class TellDrain:
    """The worker's owner is to know whether it drains."""

    is_draining: bool


Command = (
    Post
    | WriteFrame
    | EndStream
    | CutStream
    | AcceptHandoff
    | RefuseHandoff
    | Feed
    | FailHandoffs
    | Receive
    | StopReceiving
    | TellRole
    | TellDrain
)
