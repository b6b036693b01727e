"""Which splits are looked at, and which workers would switch to reach one. Knows no load forecast and no costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.roles.values import Move, RoleSplit
from router.fleet.seen import WorkerSeen
from workers.status import Role

WHOLE_GRID = 24
"""Up to so many workers every number of PREFILL workers is looked at; with more, so many numbers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`fixed`: workers that stay in their roles. A split may not have fewer of any."""

    min_prefill: int
    min_decode: int
    fixed: RoleSplit

    def allow(self, split: RoleSplit) -> bool:
        return (
            split.prefill + split.mixed >= self.min_prefill
            and split.decode + split.mixed >= self.min_decode
            and all(count >= least for count, least in zip(split, self.fixed, strict=True))
        )


def splits_of(now: RoleSplit, limits: Limits) -> list[RoleSplit]:
    """`now` first, then the others: a few hundred at most, however many workers there are."""
    size = now.size
    near = {max(0, min(size, now.prefill + change)) for change in (-4, -3, -2, -1, 0, 1, 2, 3, 4)}
    prefills = sorted({size * at // WHOLE_GRID for at in range(WHOLE_GRID + 1)} | near)
    mixeds = sorted({0, 1, 2, size // 4, size // 2, size, now.mixed, max(0, now.mixed - 1), min(size, now.mixed + 1)})
    found = [
        split
        for mixed in mixeds
        for prefill in prefills
        if prefill + mixed <= size
        if (split := RoleSplit(prefill, size - prefill - mixed, mixed)) != now and limits.allow(split)
    ]
    return [now, *found]


def num_moves(now: RoleSplit, then: RoleSplit) -> int:
    return sum(max(0, before - after) for before, after in zip(now, then, strict=True))


ROLES = (Role.PREFILL, Role.DECODE, Role.MIXED)


def moves_to(
    then: RoleSplit, roles: Mapping[str, Role], workers: Sequence[WorkerSeen], may_move: frozenset[str]
) -> list[Move]:
    """The switches that lead to a split, those that cost least first: of workers with the least to move or to finish.

    Workers that are not in `may_move` stay; so it may stop short of the split.
    """
    counts = dict.fromkeys(Role, 0)
    for role in roles.values():
        counts[role] += 1
    wanted = dict(zip(ROLES, then, strict=True))
    spare = {role: max(0, counts[role] - wanted[role]) for role in ROLES}
    missing = [role for role in ROLES for _ in range(max(0, wanted[role] - counts[role]))]
    free = sorted((worker for worker in workers if worker.worker_id in may_move), key=_effort)
    moves: list[Move] = []
    for worker in free:
        source = roles[worker.worker_id]
        if missing and spare[source]:
            spare[source] -= 1
            moves.append(Move(worker.worker_id, source, missing.pop(0)))
    return moves


def _effort(worker: WorkerSeen) -> tuple[float, str]:
    """What a switch of the worker disturbs, in tokens or so: sequences that decode there move, prompts that wait there run on."""
    used = worker.num_blocks - worker.num_free_blocks
    decoding = worker.num_sequences * 100 + used * 0.1 if worker.role.can_decode else 0.0
    return decoding + 0.1 * worker.waiting_prefill_tokens, worker.worker_id
