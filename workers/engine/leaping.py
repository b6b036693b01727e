"""Takes many steps at once in which nothing but decoding can happen, where the tokens can be had ahead, as a simulator's can. Knows no runner and no clock.

What comes of it is what the steps would have brought one by one, but for the number of outputs that say it.
"""

from __future__ import annotations

from collections.abc import Callable

from workers.engine.live_sequences import LiveSequences
from workers.request import SamplingParams
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, State

DrawRun = Callable[[SamplingParams, int, int], tuple[int, ...]]
"""`draw(params, position, count)`: output tokens position .. position+count-1."""

_STANDS = (State.TRANSFERRING, State.HELD)
"""Sequences in these states take no part in steps, and change by a command alone."""


def leapers(scheduler: Scheduler, sequences: LiveSequences) -> tuple[list[Sequence], int]:
    """The sequences that decode, in order of service, and how many steps can be taken at once; (anything, 0): the next step is an ordinary one.

    Nobody waits, computes a prompt, moves or replays; no sequence can end; and blocks for all are there beside one for each sequence.
    """
    if scheduler.waiting or sequences.has_news:
        return [], 0
    decoding: list[Sequence] = []
    num_steps = 1 << 30
    lives = sequences.lives
    for sequence in scheduler.active:
        if sequence.state is not State.DECODING:
            if sequence.state in _STANDS:
                continue
            return [], 0
        answer = lives[sequence.sequence_id].answer
        if (
            answer is None
            or sequence.export is not None
            or sequence.constraint is not None
            or sequence.num_drawn < len(sequence.known)
        ):
            return [], 0
        num_steps = min(num_steps, answer.can_run)
        decoding.append(sequence)
    if not decoding or len(decoding) > scheduler.limits.max_batch_tokens:
        return [], 0
    spare = scheduler.kv.num_available - 2 * len(decoding)
    num_steps = min(num_steps, max(0, spare) // len(decoding) * scheduler.kv.block_size)
    decoding.sort(key=lambda sequence: sequence.rank)
    return decoding, num_steps


def leap(
    scheduler: Scheduler, sequences: LiveSequences, decoding: list[Sequence], num_steps: int, draw: DrawRun
) -> None:
    """So many steps for what `leapers` has found; each sequence's tokens are said as one output."""
    said, lives = sequences.pending, sequences.lives
    for sequence in decoding:
        answer = lives[sequence.sequence_id].answer
        assert answer is not None
        position = sequence.num_drawn
        token_ids = draw(sequence.request.params, position, num_steps)
        scheduler.decoded_run(sequence, token_ids)
        said.outputs.append((sequence.sequence_id, answer.push_run(position, token_ids)))
