"""One request of a router at its worker: whose it is, what was said of it lately, and from where on it can be taken up. Knows no other request."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from workers.request import Output, Request
from workers.state_table import Rule, StateTable
from workers.status import WorkerAddress
from workers.wire.attach import Migration


class State(Enum):
    RUNNING = auto()
    """A session hears of it."""
    ORPHANED = auto()
    """It runs, its session is lost, and nobody has taken it up."""
    UNHEARD = auto()
    """It has ended, and the frame that says so has not been written to its session."""
    LEFT = auto()
    """It has ended, its session is lost, and nobody has taken it up."""
    GONE = auto()
    """Nobody can take it up any more."""


class Turn(Enum):
    """What happens to a request."""

    FINISH = auto()
    """Its answer is complete."""
    BREAK = auto()
    """It ends without an answer, or goes on at another worker."""
    WRITTEN = auto()
    """Its session has been sent its end."""
    LOSE_SESSION = auto()
    TAKE_UP = auto()
    """A session, another one or the same, hears of it from now on."""
    DROP = auto()
    """Nobody wants it any more."""


class Effect(Enum):
    """What the request table does about it."""

    TELL = "its session hears of what it says"
    AWAIT_WRITING = "it is kept until the frame that says so has been written"
    BEGIN_GRACE = "its grace begins"
    STOP = "the engine is to stop it"


_RUNS = (State.RUNNING, State.ORPHANED)
_ENDED = (State.UNHEARD, State.LEFT)
SERVED_REQUEST: StateTable[State] = StateTable(
    "a request at its worker",
    (
        Rule((State.RUNNING,), (Turn.FINISH,), State.UNHEARD, Effect.AWAIT_WRITING),
        Rule((State.ORPHANED,), (Turn.FINISH,), State.LEFT),
        Rule(_RUNS, (Turn.BREAK,), State.GONE),
        Rule((State.UNHEARD,), (Turn.WRITTEN,), State.GONE),
        Rule((State.RUNNING,), (Turn.LOSE_SESSION,), State.ORPHANED, Effect.BEGIN_GRACE),
        Rule((State.UNHEARD,), (Turn.LOSE_SESSION,), State.LEFT, Effect.BEGIN_GRACE),
        Rule(_RUNS, (Turn.TAKE_UP,), State.RUNNING, Effect.TELL),
        Rule(_ENDED, (Turn.TAKE_UP,), State.UNHEARD, Effect.AWAIT_WRITING),
        Rule(_RUNS, (Turn.DROP,), State.GONE, Effect.STOP),
        Rule(_ENDED, (Turn.DROP,), State.GONE),
    ),
)


@dataclass(slots=True, eq=False)
class ServedRequest:
    """One request that was accepted. `kept` are its last outputs, under whatever name they were said."""

    sequence_id: int
    name: str
    """The same for all its attempts, wherever they run."""
    attempt: str
    """What its owner calls it; the last owner, when there is none."""
    request: Request
    candidates: tuple[WorkerAddress, ...]
    """Who is to compute its prompt, best first; none: this worker."""
    migration: Migration | None
    """Where it ran before, when it is taken over from there."""
    due_s: float
    """When its first token is due; infinity when nobody said."""
    owner: int | None
    """The session that hears of it; None: it is an orphan."""
    key: bytes
    """Who has a permit made with it may take the request over."""
    end: int
    """Position that the next output has: tokens said here, or given with the request."""
    state: State = State.RUNNING
    kept: deque[Output] = field(default_factory=deque)
    num_kept: int = 0
    """Entries of `kept`: see RequestTable."""
    dropped: int = -1
    """Position of the last output that is kept no more. What else was said at that position is no use without it."""
    finish: Output | None = None
    """How it ended."""
    last_said: int = 0
    """Its end is the last of so many outputs that its session was told."""
    orphaned_s: float = 0.0
    orphaned_at: int = 0
    """`end` when its session was lost."""

    @property
    def first_kept(self) -> int:
        """Position from which on it can be taken up."""
        return max(self.dropped + 1, self.kept[0].position if self.kept else self.end)

    def keep(self, output: Output, max_kept: int) -> bool:
        """Remembers an output, and at most so many entries in all. False: an orphan has said so much that nobody could take it
        up any more."""
        self.kept.append(output)
        self.num_kept += _num_entries(output)
        self.end = output.position + len(output.token_ids)
        while self.num_kept > max_kept:
            self.dropped = self.kept[0].position
            self.num_kept -= _num_entries(self.kept.popleft())
        while self.kept and self.kept[0].position == self.dropped:  # the scores of a prompt come in several outputs
            self.num_kept -= _num_entries(self.kept.popleft())
        return self.owner is not None or self.first_kept <= self.orphaned_at

    def since(self, position: int) -> list[Output] | None:
        """Its outputs from a position on. None: they are not kept, or none begins there."""
        if position <= self.dropped:
            return None
        outputs = [output for output in self.kept if output.position >= position]
        if outputs and outputs[0].position == position:
            return outputs
        if position != self.end:
            return None
        if self.finish is None:
            return []
        # The client has every token and all of its text: only how it ended is missing.
        finish = self.finish
        return [Output(self.attempt, position, finish_reason=finish.finish_reason, stop_reason=finish.stop_reason)]


def _num_entries(output: Output) -> int:
    """What it takes to keep it: tokens, and alternatives of logprobs."""
    entries = len(output.token_ids) or 1
    entries += sum(len(logprob.top) for logprob in output.logprobs)
    return entries + sum(part.token_ids.size + part.top_ids.size for part in output.prompt_logprobs)
