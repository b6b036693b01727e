"""What a router sees of each worker, as plain values for whoever decides on roles. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from router.fleet.fleet import Fleet
from workers.status import Role


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """One worker at one moment, as its own reports say, and what its steps are expected to take (router.forecast)."""

    worker_id: str
    role: Role
    generation: int
    is_up: bool
    """Its stream is open and has brought a status; otherwise the rest is what was said last."""
    is_draining: bool
    is_rebuilding: bool
    num_sequences: int
    """That decode, wait or arrive there."""
    waiting_prefill_tokens: int
    """Of prompts that were accepted and are not computed yet."""
    num_free_blocks: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    batch_tokens: int
    seconds: tuple[float, float, float, float, float]
    """Of a step, of a decoding sequence, of a token of its context, of a prompt token, of a token that it looks back at."""
    is_known: bool
    """Those were measured."""
    num_decoding: int = 0
    """Of `num_sequences`: those whose prompt is there, on a worker that decodes."""

    @property
    def takes_work(self) -> bool:
        return self.is_up and not self.is_draining and not self.is_rebuilding


def workers_seen(fleet: Fleet) -> tuple[WorkerSeen, ...]:
    """All members that have said what they are, by id."""
    table, seen = fleet.table, []
    for entry in fleet:
        status = entry.status
        if status is None or not entry.is_member or not entry.is_expected:
            continue
        load, row = entry.load, entry.row
        step_s, decode_s, context_s, prompt_s, look_s = map(float, table.seconds[row])
        seen.append(
            WorkerSeen(
                status.worker_id,
                status.role,
                entry.generation,
                entry.is_up,
                status.is_draining,
                status.is_rebuilding,
                load.num_running + load.num_waiting + load.num_transferring,
                load.waiting_prefill_tokens,
                load.num_free_blocks,
                load.num_blocks,
                status.model.block_size,
                status.max_num_seqs,
                status.max_batch_tokens,
                (step_s, decode_s, context_s, prompt_s, look_s),
                bool(table.is_known[row]),
                load.num_running if status.role.can_decode else 0,
            )
        )
    return tuple(sorted(seen, key=lambda worker: worker.worker_id))
