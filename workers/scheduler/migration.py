"""Decides when a running sequence stands still for its migration, and what its new home reserves for it; integers only.

While a sequence is copied it goes on decoding: full blocks never change again, so they are announced as they fill. It stands
still when its receiver has all of those, so that at most the last block and what filled meanwhile is still to be copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.errors import Refusal, Refused
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import MoveProgress, Sequence, State, Turn

MAX_BLOCKS_PER_STEP = 32
"""A pool in device memory copies what is announced, so a long sequence is announced over several steps."""
MIN_SPARE_BLOCKS = 4
SPARE_PART = 8
"""A migrant's new home has room for what it grows by while it is copied: an eighth of it, at least four blocks."""


@dataclass(frozen=True, slots=True)
class ReadyToMove:
    """Entries first .. end-1 of the block table are final."""

    first: int
    end: int
    is_all: bool
    """Nothing else is final yet."""
    is_last: bool
    """The sequence stands still, and these are the last of its blocks."""


def begin_export(sequence: Sequence, first_block: int, num_blocks: int, block_size: int) -> None:
    """Lets another worker copy the sequence, which has entries before `first_block` and room for `num_blocks` in all.

    Raises Refused(NOT_MOVABLE) unless it decodes, is not being copied already, and fits.
    """
    name = f"sequence {sequence.sequence_id}"
    if sequence.state is not State.DECODING:
        raise Refused(Refusal.NOT_MOVABLE, f"{name} is {sequence.state.name.lower()}, not decoding")
    if sequence.export is not None:
        raise Refused(Refusal.NOT_MOVABLE, f"{name} is being moved already")
    if first_block * block_size >= sequence.num_prompt:
        raise Refused(Refusal.INVALID, f"the receiver claims to hold all of the prompt of {name}")
    if sequence.num_computed >= num_blocks * block_size:
        raise Refused(Refusal.NOT_MOVABLE, f"{name} is longer than the {num_blocks} blocks that were reserved for it")
    sequence.export = MoveProgress(num_blocks, first_block)


def advance_export(sequence: Sequence, block_size: int) -> ReadyToMove | None:
    """Called between steps for a sequence that is being copied: what can be announced now, and whether it stands still.

    Ends the export (`sequence.export` is None) when the sequence outgrows the reserved room before its copy is nearly done.
    """
    export = sequence.export
    if export is None or sequence.state is not State.DECODING:
        return None
    full, first = sequence.num_computed // block_size, export.num_filled
    is_first, export.is_announced = not export.is_announced, True
    export.num_filled = min(max(full, first), first + MAX_BLOCKS_PER_STEP)
    is_caught_up = export.num_filled >= full
    if export.is_due and is_caught_up:
        sequence.take(Turn.HALT)
        end = -(-sequence.num_computed // block_size)
        return ReadyToMove(first, end, True, True)
    if sequence.num_computed + 1 > export.num_blocks * block_size:
        sequence.export = None
        return None
    return ReadyToMove(first, export.num_filled, is_caught_up, False) if is_first or export.num_filled > first else None


def resume(sequence: Sequence) -> None:
    """The migration came to nothing: the sequence goes on here as if it had never been tried."""
    sequence.export = None
    if sequence.state is State.MOVING:
        sequence.take(Turn.RESUME)


def reserve_migrant(scheduler: Scheduler, sequence: Sequence, longest: int) -> None:
    """Reserves blocks for a sequence that runs elsewhere, now or never: waiting here would not serve it.

    `longest` bounds prompt and output in tokens. Raises Refused(QUEUE_FULL).
    """
    size = scheduler.kv.block_size
    num_now = scheduler.kv.blocks_for(sequence.num_prompt + len(sequence.known))
    spare = max(MIN_SPARE_BLOCKS, num_now // SPARE_PART)
    num_tokens = min((num_now + spare) * size, max(longest, num_now * size))
    scheduler.admit_migrant(sequence, num_tokens)


def land_migrant(scheduler: Scheduler, sequence: Sequence, known: tuple[int, ...], num_computed: int) -> None:
    """All blocks are in place: the sequence decodes from the next step on, exactly where it stood.

    Raises Refused(NOT_MOVABLE), and changes nothing, when the state that came does not continue what is known here.
    """
    num_drawn = num_computed - sequence.num_prompt + 1
    if not 1 <= num_drawn <= len(known) or known[: len(sequence.known)] != tuple(sequence.known):
        raise Refused(Refusal.NOT_MOVABLE, "the state that came does not continue what the client has")
    sequence.known = list(known)
    sequence.num_drawn = num_drawn
    scheduler.landed(sequence, num_computed)
