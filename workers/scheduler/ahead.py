"""Decides a step while the one before it still runs, as far as that is possible without its tokens; integers only.

What the running step changes is certain but for two things: which tokens it draws, and whom they end. So a sequence
goes on with a token that is `is_late`, and one that turns out to have ended has computed one token for nothing, into a
block of its own. Everything else is the scheduler's ordinary choice, and since no token depends on a batch's company
the choice may differ from the one it would have made later.
"""

from __future__ import annotations

from dataclasses import MISSING, fields

from workers.kv_cache.block_pool import OutOfBlocks
from workers.request import SamplingParams
from workers.runner import Batch, SequenceSlice
from workers.scheduler.load import RUNS
from workers.scheduler.scheduler import ScheduledStep, Scheduler
from workers.scheduler.sequence import Kind, Sequence, State

_HISTORY_FREE = {
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "stop", "stop_token_ids",
    "ignore_eos", "include_stop", "skip_special_tokens", "logprobs", "prompt_logprobs", "logprob_token_ids",
}  # fmt: skip
"""Parameters under which a token is drawn without a look at the output so far."""
_NEUTRAL = tuple((f.name, f.default) for f in fields(SamplingParams) if f.name not in _HISTORY_FREE)
"""All others, whatever is added later, with the values that switch them off."""
assert all(default is not MISSING for _, default in _NEUTRAL)


def schedule_ahead(scheduler: Scheduler, running: Batch) -> ScheduledStep | None:
    """The step after `running`; None when it must wait for the tokens of that step.

    It must wait where a draw looks at all tokens before it, where no block is left (somebody may have to be preempted,
    which nobody can be while a step writes its blocks), after prompts of other workers, whose blocks are copied
    out of the device's memory behind whatever was launched, and while a sequence moves away, which must be able to stand still,
    or waits for its prefix, which only an ordinary choice looks for.
    """
    pieces = {piece.sequence_id: piece for piece in (*running.prefill, *running.decode)}
    active = sorted((s for s in scheduler.active if s.state in RUNS), key=lambda s: s.rank)
    if any((s.kind is Kind.SOURCE and s.sequence_id in pieces) or s.export is not None for s in active):
        return None
    if any(s.state is State.PROMOTING for s in scheduler.active):
        return None
    able = [s for s in active if _will_decode(s, pieces.get(s.sequence_id))]
    decoding = scheduler.turns.choose(able)[: scheduler.limits.max_batch_tokens]
    if any(s.sequence_id in pieces and _needs_token(s) for s in decoding):
        return None
    decode: list[SequenceSlice] = []
    for sequence in decoding:
        piece = pieces.get(sequence.sequence_id)
        start = sequence.num_computed + (len(piece.token_ids) if piece else 0)
        try:
            scheduler.kv.grow(sequence.table, start + 1)
        except OutOfBlocks:
            return None
        decode.append(sequence.decode_slice() if piece is None else _late_slice(sequence, start))
    room = scheduler.room_beside(len(decode))
    prefill: list[SequenceSlice] = []
    for sequence in active:
        if sequence.state is State.PREFILLING:
            piece = pieces.get(sequence.sequence_id)
            num_ahead = len(piece.token_ids) if piece else 0
            num_left, start = sequence.num_uncomputed_prompt - num_ahead, sequence.num_computed + num_ahead
            length = room.fit(num_left, start)
            if length > 0 and (length < num_left or sequence.can_draw):
                prefill.append(sequence.prefill_slice(length, num_ahead))
                room.take(length, start)
    promotions: list[Sequence] = []
    transfers = scheduler.admit(room, prefill, promotions)
    scheduler.turns.give(decoding)
    return ScheduledStep(Batch(tuple(prefill), tuple(decode)), tuple(transfers), tuple(promotions))


def _will_decode(sequence: Sequence, piece: SequenceSlice | None) -> bool:
    """Whether the sequence decodes once its piece has run, unless a token ends it before its length does."""
    if piece is None:
        return sequence.state is State.DECODING and sequence.can_draw
    if sequence.state is State.PREFILLING and len(piece.token_ids) < sequence.num_uncomputed_prompt:
        return False
    return sequence.num_drawn + 1 < sequence.max_output_tokens


def _needs_token(sequence: Sequence) -> bool:
    """Whether the draw after the running one looks at a token that the running one draws."""
    is_known = sequence.num_drawn < len(sequence.known)
    params = sequence.request.params
    return not is_known and any(getattr(params, name) != neutral for name, neutral in _NEUTRAL)


def _late_slice(sequence: Sequence, start: int) -> SequenceSlice:
    """The decode slice that follows the sequence's running piece; a token to be replayed is known already."""
    is_late = sequence.num_drawn >= len(sequence.known)
    return SequenceSlice(
        sequence_id=sequence.sequence_id,
        token_ids=(0 if is_late else sequence.known[sequence.num_drawn],),
        start=start,
        block_table=sequence.table.row,
        sample=sequence.sample_spec(num_ahead=1),
        is_late=is_late,
    )
