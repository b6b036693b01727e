"""How busy a scheduler is, as routers hear it and as its engine must know; changes nothing."""

from __future__ import annotations

from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Kind, State
from workers.status import Load

_RUNS = (State.DECODING, State.PREFILLING)
_WAITS_FOR_OTHERS = (State.PROMOTING, State.TRANSFERRING, State.MOVING, State.HELD)


def has_work(scheduler: Scheduler) -> bool:
    """True when a step could compute or admit something, or end a wait."""
    return bool(scheduler.waiting) or any(s.state in _RUNS or s.state is State.PROMOTING for s in scheduler.active)


def load_of(scheduler: Scheduler, step_s: float) -> Load:
    """`step_s`: how long the last step took."""
    sequences, kv = scheduler.active, scheduler.kv
    return Load(
        num_waiting=len(scheduler.waiting),
        num_running=sum(1 for s in sequences if s.state in _RUNS),
        num_transferring=sum(1 for s in sequences if s.state in _WAITS_FOR_OTHERS),
        waiting_prefill_tokens=sum(
            s.num_uncomputed_prompt
            for s in (*scheduler.waiting, *sequences)
            if s.state in (State.WAITING, State.PROMOTING, State.PREFILLING) and s.kind is not Kind.TARGET
        ),
        num_free_blocks=kv.num_available,
        num_blocks=kv.num_blocks,
        step_s=step_s,
    )
