"""One request of a router at its worker: whose it is, who else hears of it, what was said of it lately, and from where on it can be taken up. Knows no other request."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from workers.request import Output, Request, merged
from workers.state_table import Rule, StateTable
from workers.status import WorkerAddress
from workers.wire.attach import FoundRequest, Kept, Migration


class State(Enum):
    RUNNING = auto()
    """A session hears of it."""
    ORPHANED = auto()
    """It runs, its session is lost, and nobody has taken it up."""
    UNHEARD = auto()
    """It has ended, and the frame that says so has not been written to its session."""
    LEFT = auto()
    """It has ended, its session is lost, and nobody has taken it up."""
    KEPT = auto()
    """Its answer is complete, whoever had it has it, and it stays for a while for who asks for it by its job."""
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
    WAIT_OUT = auto()
    """Its grace has passed."""
    DROP = auto()
    """Nobody wants it any more."""


class Effect(Enum):
    """What the request table does about it."""

    TELL = "its session hears of what it says"
    AWAIT_WRITING = "it is kept until the frame that says so has been written"
    BEGIN_GRACE = "its grace begins"
    KEEP = "it is kept with the other answers"
    STOP = "the engine is to stop it"


_RUNS = (State.RUNNING, State.ORPHANED)
_ENDED = (State.UNHEARD, State.LEFT, State.KEPT)
SERVED_REQUEST: StateTable[State] = StateTable(
    "a request at its worker",
    (
        Rule((State.RUNNING,), (Turn.FINISH,), State.UNHEARD, Effect.AWAIT_WRITING),
        Rule((State.ORPHANED,), (Turn.FINISH,), State.LEFT),
        Rule(_RUNS, (Turn.BREAK,), State.GONE),
        Rule((State.UNHEARD,), (Turn.WRITTEN,), State.KEPT, Effect.KEEP),
        Rule((State.LEFT,), (Turn.WAIT_OUT,), State.KEPT, Effect.KEEP),
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
    ends_s: float
    """When it is to end, done or not; infinity when nobody said. It is for its first owner: others say for themselves."""
    owner: int | None
    """The session that hears of it; None: it is an orphan."""
    key: bytes
    """Who has a permit made with it may take the request over."""
    end: int
    """Position that the next output has: tokens said here, or given with the request."""
    job: Kept | None = None
    cached_tokens: int = 0
    """Of the prompt, as was said with its first token."""
    moves_to: str = ""
    """The worker that was last permitted to take it over."""
    listeners: dict[tuple[int, str], bytes] = field(default_factory=dict)
    """Sessions that hear of it beside its owner, each with what it calls it, and the key that comes into force when it becomes
    the owner."""
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    """All output tokens, those given with the request included; without meaning where `has_gap`."""
    has_gap: bool = False
    """Tokens before the last ones were never said here: it came by migration, and went on elsewhere after it had been sent."""
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
        if output.position > self.end:
            self.has_gap, self.num_kept, self.dropped = True, 0, output.position - 1
            self.kept.clear()
        self.kept.append(output)
        self.num_kept += num_entries(output)
        self.end = output.position + len(output.token_ids)
        self.token_ids.extend(output.token_ids)
        self.cached_tokens = self.cached_tokens or output.cached_tokens
        while self.num_kept > max_kept:
            self.dropped = self.kept[0].position
            self.num_kept -= num_entries(self.kept.popleft())
        while self.kept and self.kept[0].position == self.dropped:  # the scores of a prompt come in several outputs
            self.num_kept -= num_entries(self.kept.popleft())
        return self.owner is not None or self.is_background or self.first_kept <= self.orphaned_at

    def landed(self, token_ids: Sequence[int]) -> None:
        """It has moved here, where so many tokens of it are known: the next one said is behind them."""
        self.token_ids, self.end = array("I", token_ids), len(token_ids)

    @property
    def tenant(self) -> int:
        """Whose it counts as, among what is kept."""
        return 0 if self.job is None else self.job.owner

    @property
    def is_background(self) -> bool:
        return self.job is not None and self.job.is_background

    @property
    def is_whole(self) -> bool:
        """Everything from its first token on can be had here. What is not kept is made of its tokens again, where these alone
        say it: then texts are missing."""
        params = self.request.params
        return (self.first_kept == 0 and self.dropped < 0) or (
            not self.has_gap and params.logprobs is None and params.prompt_logprobs is None
        )

    def since(self, position: int, may_lack_text: bool = False) -> list[Output] | None:
        """Its outputs from a position on. None: they are not kept, or none begins there. With `may_lack_text` those that are not
        kept are made of their tokens, as `is_whole` says."""
        if may_lack_text and position == 0 and self.first_kept > 0 and self.is_whole:
            first = self.first_kept
            known = Output(self.attempt, 0, tuple(self.token_ids[:first]), cached_tokens=self.cached_tokens)
            rest = self.since(first)
            return None if rest is None else [known, *rest]
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

    def merge(self) -> None:
        """It has ended: its outputs become one, which takes less."""
        if len(self.kept) > 1 and self.dropped < 0:
            self.kept = deque([merged(self.kept)])

    def found(self) -> FoundRequest:
        reason = None if self.finish is None else self.finish.finish_reason
        num_prompt = len(self.request.prompt_token_ids)
        return FoundRequest(self.name, num_prompt, self.end, self.cached_tokens, reason, self.is_whole)

    @property
    def num_bytes(self) -> int:
        """What it takes to keep it once it has ended, about."""
        texts = sum(len(output.text) for output in self.kept)
        # Measured: a prompt with the keys of its blocks takes 46.5 bytes a token.
        prompt = 48 * (len(self.request.prompt_token_ids) + len(self.request.replay_token_ids))
        ticket = 0 if self.job is None else len(self.job.ticket)
        return 2048 + 48 * self.num_kept + 4 * len(self.token_ids) + 4 * texts + prompt + ticket


def num_entries(output: Output) -> int:
    """What it takes to keep it: tokens, and alternatives of logprobs."""
    entries = len(output.token_ids) or 1
    entries += sum(len(logprob.top) for logprob in output.logprobs)
    return entries + sum(part.token_ids.size + part.top_ids.size for part in output.prompt_logprobs)
