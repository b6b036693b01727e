"""Chooses which sequence gives its blocks up when the pool is empty."""

from __future__ import annotations

from collections.abc import Iterable

from workers.errors import InvariantViolated
from workers.scheduler.sequence import Kind, Sequence, State


def choose_victim(active: Iterable[Sequence]) -> Sequence:
    """The last in order of service among those whose blocks no other worker must read or write.

    One that is being copied to another worker comes only when there is no other: its migration ends with it, and leaving
    is what frees blocks soonest. There always is one: the sequence that asked for a block is itself a candidate.
    """
    candidates = [s for s in active if s.state in (State.DECODING, State.PREFILLING) and s.kind is not Kind.SOURCE]
    if not candidates:
        raise InvariantViolated("preemption was asked for while nothing can be preempted")
    return max(candidates, key=lambda s: (s.export is None, s.rank))
