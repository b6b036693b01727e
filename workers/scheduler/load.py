"""How busy a scheduler is, as routers hear it and as its engine must know; changes nothing."""

from __future__ import annotations

from typing import NamedTuple

from workers.runner import Batch
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Kind, State
from workers.status import Load

RUNS = (State.DECODING, State.PREFILLING)
_WAITS_FOR_OTHERS = (State.PROMOTING, State.TRANSFERRING, State.MOVING, State.HELD)


def has_work(scheduler: Scheduler) -> bool:
    """True when a step could compute or admit something, or end a wait."""
    return bool(scheduler.waiting) or any(s.state in RUNS or s.state is State.PROMOTING for s in scheduler.active)


class StepWork(NamedTuple):
    """What one step computed and how long it took; the fields are those of Load."""

    step_s: float = 0.0
    step_decodes: int = 0
    step_context: int = 0
    step_prompt_tokens: int = 0
    step_prompt_context: int = 0


def work_of(batch: Batch, step_s: float) -> StepWork:
    """Of a step that took `step_s`."""
    chunks = [(len(piece.token_ids), piece.start) for piece in batch.prefill]
    return StepWork(
        step_s,
        len(batch.decode),
        sum([piece.start for piece in batch.decode]),
        sum([length for length, _ in chunks]),
        sum([length * start + length * length // 2 for length, start in chunks]),
    )


def load_of(scheduler: Scheduler, work: StepWork) -> Load:
    """`work`: the last step that computed anything."""
    sequences, kv = scheduler.active, scheduler.kv
    return Load(
        num_waiting=len(scheduler.waiting),
        num_running=sum(1 for s in sequences if s.state in RUNS),
        num_transferring=sum(1 for s in sequences if s.state in _WAITS_FOR_OTHERS),
        waiting_prefill_tokens=sum(
            s.num_uncomputed_prompt
            for s in (*scheduler.waiting, *sequences)
            if s.state in (State.WAITING, State.PROMOTING, State.PREFILLING) and s.kind is not Kind.TARGET
        ),
        num_free_blocks=kv.num_available,
        num_blocks=kv.num_blocks,
        step_s=work.step_s,
        step_decodes=work.step_decodes,
        step_context=work.step_context,
        step_prompt_tokens=work.step_prompt_tokens,
        step_prompt_context=work.step_prompt_context,
    )
