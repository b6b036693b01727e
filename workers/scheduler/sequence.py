"""One request's progress through the engine: plain data, and a table of what leads from state to state."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum, auto

from workers.kv_cache.block_hash import PromptBlocks
from workers.kv_cache.manager import BlockTable
from workers.request import Request
from workers.runner import LogitEdits, SampleSpec, SequenceSlice
from workers.sampling.constraint import Constraint
from workers.sampling.edits import EditTracker, changes_logits
from workers.state_table import Rule, StateTable
from workers.status import PrefixHint


class State(Enum):
    WAITING = auto()
    """Holds no blocks; in the queue."""
    PROMOTING = auto()
    """Its blocks are reserved and the beginning of its prompt is on the way into them from a lower tier or another worker."""
    TRANSFERRING = auto()
    """Its blocks are reserved and another worker computes its prompt into them."""
    PREFILLING = auto()
    DECODING = auto()
    MOVING = auto()
    """Stands still while another worker takes it over; its blocks stay until that worker has them, or it goes on here."""
    HELD = auto()
    """A finished prefill for another worker; its blocks stay until that worker has them."""
    ENDING = auto()
    """Nobody waits for it any more, but a step that is running still writes to its blocks."""
    FINISHED = auto()


class Turn(Enum):
    """What happens to a sequence."""

    PROMOTE = auto()
    """It has its blocks, and waits for lower tiers or another worker to fill the first of them."""
    DELEGATE = auto()
    """It has its blocks, and another worker computes its prompt into them."""
    COMPUTE = auto()
    """It has its blocks, and its prompt is computed here."""
    FALL_BACK = auto()
    """The other worker does not compute its prompt."""
    LAND = auto()
    """What another worker computed is in its blocks."""
    GO_ON = auto()
    """Its prompt has been computed, and it decodes here."""
    HOLD = auto()
    """Its prompt has been computed for another worker."""
    PREEMPT = auto()
    """Others need its blocks, or what they held is lost."""
    HALT = auto()
    """Another worker has nearly all of it."""
    RESUME = auto()
    """The other worker does not take it over."""
    END = auto()
    """It has ended in a step that is still running."""
    FINISH = auto()
    """It has ended, or nobody wants it any more."""


class Effect(Enum):
    """What the scheduler does about it."""

    LEAVE_QUEUE = "it leaves the queue"
    FREE = "its blocks are freed"
    START_AGAIN = "its blocks are freed, and it queues to start again with the tokens that it has"
    STAY = "it is computed here from now on"


_RUNS = (State.PREFILLING, State.DECODING)
_HAS_BLOCKS = (State.PROMOTING, State.TRANSFERRING, *_RUNS, State.MOVING, State.HELD, State.ENDING)
SEQUENCE: StateTable[State] = StateTable(
    "a sequence",
    (
        Rule((State.WAITING,), (Turn.PROMOTE,), State.PROMOTING),
        Rule((State.WAITING, State.PROMOTING), (Turn.DELEGATE,), State.TRANSFERRING),
        Rule((State.WAITING, State.PROMOTING), (Turn.COMPUTE,), State.PREFILLING),
        Rule((State.TRANSFERRING,), (Turn.FALL_BACK,), State.PREFILLING, Effect.STAY),
        Rule((State.TRANSFERRING,), (Turn.LAND,), State.DECODING),
        Rule((State.PREFILLING,), (Turn.GO_ON,), State.DECODING),
        Rule((State.PREFILLING,), (Turn.HOLD,), State.HELD),
        Rule(_RUNS, (Turn.PREEMPT,), State.WAITING, Effect.START_AGAIN),
        Rule((State.DECODING,), (Turn.HALT,), State.MOVING),
        Rule((State.MOVING,), (Turn.RESUME,), State.DECODING),
        Rule(_RUNS, (Turn.END,), State.ENDING),
        Rule((State.WAITING,), (Turn.FINISH,), State.FINISHED, Effect.LEAVE_QUEUE),
        Rule(_HAS_BLOCKS, (Turn.FINISH,), State.FINISHED, Effect.FREE),
    ),
)


class Kind(Enum):
    """Who does what for this sequence."""

    LOCAL = auto()
    """Prefill and decode here."""
    TARGET = auto()
    """Decode here, prefill elsewhere."""
    SOURCE = auto()
    """Prefill here for another worker; one token, then hold the blocks."""
    MIGRANT = auto()
    """Decode here what another worker has run so far; LOCAL once it has landed."""


@dataclass(slots=True)
class MoveProgress:
    """The copying of a running sequence to another worker, which has room for entries 0 .. num_blocks-1 of its table."""

    num_blocks: int
    num_filled: int
    """Entries of the block table that were announced as final, or that the receiver has already."""
    is_announced: bool = False
    """Its receiver has heard of it; there may be no full block to tell."""
    is_due: bool = False
    """The receiver has nearly everything: stand still at the next step boundary."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable progress of one request; the scheduler is its only owner.

    `known` are all output tokens that exist (given for replay, or drawn here); `num_drawn` says how many of them this
    run has passed. While num_drawn < len(known) the next token is forced, so a replay repeats the tokens
    and rebuilds the KV through the decode path, bit for bit.
    """

    sequence_id: int
    request: Request
    kind: Kind
    arrival: int
    suppressed_token_ids: tuple[int, ...] = ()
    """EOS and stop ids, not to be drawn before min_tokens."""
    prompt_blocks: PromptBlocks | None = None
    """Filled by the scheduler."""
    state: State = State.WAITING
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    """Tokens whose KV is in the blocks."""
    known: list[int] = field(default_factory=list)
    num_drawn: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that a prefix cache gave, when the sequence was first admitted."""
    num_preemptions: int = 0
    max_output_tokens: int = sys.maxsize
    """It ends with this many, if not before."""
    export: MoveProgress | None = None
    """Set while another worker copies this sequence."""
    hint: PrefixHint | None = None
    """Where the beginning of the prompt can be had."""
    tracker: EditTracker | None = None
    """Of what parameters and tokens do to the logits; made with the first draw."""
    constraint: Constraint | None = None
    """Which tokens may be drawn; None: all."""
    last_turn: int = 0
    """The number of the step in which it decoded last."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: priority, then arrival."""
        return (self.request.priority, self.arrival)

    @property
    def num_uncomputed_prompt(self) -> int:
        return max(0, self.num_prompt - self.num_computed)

    @property
    def can_draw(self) -> bool:
        """Whether the next token can be drawn, or is known: a grammar may still be in preparation."""
        return self.constraint is None or self.constraint.is_ready or self.num_drawn < len(self.known)

    def take(self, turn: Turn) -> Effect | None:
        """What is to be done about it. Raises InvariantViolated, and changes nothing, when the table has no rule for it."""
        step = SEQUENCE.step(self.state, turn)
        self.state = step.to
        effect: Effect | None = step.action
        return effect

    def sample_spec(self, num_ahead: int = 0) -> SampleSpec:
        """How to draw output token number `num_drawn`, or one so many further on."""
        position = self.num_drawn + num_ahead
        params = self.request.params
        if position < len(self.known):
            forced = self.known[position]
            if self.constraint is not None:  # step by step: all at once, a long replay would hold others up
                self.constraint.follow(self.known, position)
            prompt, output = self.request.prompt_token_ids, self.known[:position]
            return SampleSpec(params, self.request.choice_index, position, prompt, output, forced_token_id=forced)
        has_no_end = params.ignore_eos and params.grammar  # whose end would be the output's
        suppressed = self.suppressed_token_ids if position < params.min_tokens or has_no_end else ()
        return SampleSpec(
            params=params,
            choice_index=self.request.choice_index,
            position=position,
            prompt_token_ids=self.request.prompt_token_ids,
            output_token_ids=self.known,
            suppressed_token_ids=suppressed,
            edits=self._edits(suppressed),
        )

    def _edits(self, suppressed: tuple[int, ...]) -> LogitEdits | None:
        """What changes about the logits of the token that follows `known`."""
        if not (suppressed or changes_logits(self.request.params)):
            return None
        if self.tracker is None:
            self.tracker = EditTracker(self.request.params, self.request.prompt_token_ids, self.constraint)
        return self.tracker.edits(self.known, suppressed)

    def prefill_slice(self, num_tokens: int, num_ahead: int = 0) -> SequenceSlice:
        """The next `num_tokens` prompt tokens, behind `num_ahead` that are running; samples when they are the last."""
        start = self.num_computed + num_ahead
        end = start + num_tokens
        prompt = self.request.prompt_token_ids
        return SequenceSlice(
            sequence_id=self.sequence_id,
            token_ids=prompt[start:end],
            start=start,
            block_table=self.table.row,
            sample=self.sample_spec() if end == len(prompt) else None,
            prompt_logprobs=self.request.params.prompt_logprobs,
            next_token_id=prompt[end] if end < len(prompt) else None,
        )

    def decode_slice(self) -> SequenceSlice:
        """The last drawn token, to draw the one after it."""
        return SequenceSlice(
            sequence_id=self.sequence_id,
            token_ids=(self.known[self.num_drawn - 1],),
            start=self.num_computed,
            block_table=self.table.row,
            sample=self.sample_spec(),
        )
