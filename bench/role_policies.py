"""Two published ways to change roles, written anew from their descriptions as planners of Baton's role controller, to compare with it under the same rules.

Both decide one flip at a time from the load that workers report; the switches themselves are carried out by Baton's machine, so they are safe here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from cluster.roles.config import RolesConfig
from cluster.roles.forecasting import foretell
from cluster.roles.outlook import RoleTargets
from cluster.roles.planner import Tick
from cluster.roles.values import Alternative, Decision, Move, Observation, split_of
from router.fleet.seen import WorkerSeen
from workers.status import Role


class FlipPlanner(ABC):
    """Asks `_flip` once an interval for a worker to flip between PREFILL and DECODE; the last of its kind stays."""

    def __init__(self, config: RolesConfig, targets: RoleTargets, local_tokens: int = 0) -> None:
        self._config = config
        self._targets = targets
        self._looked_s = float("-inf")
        self._num_decisions = 0
        self.last: Decision | None = None

    @property
    def desired_workers(self) -> int:
        return 0

    def handle(self, event: Observation | Tick, now: float) -> list[Decision]:
        if not isinstance(event, Observation) or now < self._looked_s + self._config.interval_s:
            return []
        self._looked_s = now
        there = [w for w in event.workers if w.takes_work and w.worker_id not in event.switching]
        prefill = [w for w in there if w.role is Role.PREFILL]
        decode = [w for w in there if w.role is Role.DECODE]
        if not prefill or not decode or event.switching:
            return []
        worker, reason = self._flip(prefill, decode)
        if worker is None or len(prefill if worker.role is Role.PREFILL else decode) < 2:
            return []
        self._num_decisions += 1
        target = Role.DECODE if worker.role is Role.PREFILL else Role.PREFILL
        nothing = Alternative(split_of(w.role for w in there), 0.0)
        forecast = foretell(event, self._targets)
        move = Move(worker.worker_id, worker.role, target)
        return [Decision(self._num_decisions, (move,), reason, nothing, nothing, (), forecast, 0)]

    @abstractmethod
    def _flip(self, prefill: list[WorkerSeen], decode: list[WorkerSeen]) -> tuple[WorkerSeen | None, str]:
        """The worker to switch, and why; None: nobody."""

    def _wait_s(self, worker: WorkerSeen) -> float:
        """Until what waits at a prefill worker has been computed."""
        step_s, _, _, prompt_s, _ = worker.seconds
        return worker.waiting_prefill_tokens * (prompt_s + step_s / max(64, worker.batch_tokens))

    def _tpot_s(self, worker: WorkerSeen) -> float:
        """Of a decode worker, with one sequence more."""
        step_s, decode_s, context_s, _, _ = worker.seconds
        used = (worker.num_blocks - worker.num_free_blocks) * worker.block_size
        return step_s + (worker.num_sequences + 1) * decode_s + used * context_s


class ThresholdFlip(FlipPlanner):
    """As xllm-service does: a decode worker that has nothing to do becomes a prefill worker at once; when no decode worker keeps the target, the prefill
    worker with the least to do becomes a decode worker, if prompts wait little on average or decode workers are the fewer."""

    def _flip(self, prefill: list[WorkerSeen], decode: list[WorkerSeen]) -> tuple[WorkerSeen | None, str]:
        idle = [worker for worker in decode if not worker.num_sequences]
        if idle and len(decode) > 1:
            return idle[0], "it has nothing to decode"
        if min(self._tpot_s(worker) for worker in decode) > self._targets.tpot_s:
            average_s = sum(self._wait_s(worker) for worker in prefill) / len(prefill)
            if average_s < self._targets.ttft_s * (len(prefill) - 1) / len(prefill) or len(decode) < len(prefill):
                return min(prefill, key=self._wait_s), "no decode worker keeps the target"
        return None, ""


class SloFlip(FlipPlanner):
    """As Arrow does: by levels of load in relation to the targets. When even the best prefill worker would miss the first token and some decode worker has
    little to do, that one flips; when all decode workers are over, and some prefill worker has little to do, that one flips."""

    HIGH, LOW = 1.0, 0.5

    def _flip(self, prefill: list[WorkerSeen], decode: list[WorkerSeen]) -> tuple[WorkerSeen | None, str]:
        waits = {worker.worker_id: self._wait_s(worker) / self._targets.ttft_s for worker in prefill}
        paces = {worker.worker_id: self._tpot_s(worker) / self._targets.tpot_s for worker in decode}
        calmest = min(decode, key=lambda worker: paces[worker.worker_id])
        idlest = min(prefill, key=lambda worker: waits[worker.worker_id])
        if waits[idlest.worker_id] > self.HIGH and paces[calmest.worker_id] <= self.LOW:
            return calmest, "first tokens are late and decode has room"
        if min(paces.values()) > self.HIGH and waits[idlest.worker_id] <= self.LOW:
            return idlest, "answers are slow and prefill has room"
        return None, ""


POLICIES: dict[str, Callable[[RolesConfig, RoleTargets, int], FlipPlanner]] = {
    "threshold flip": ThresholdFlip,
    "SLO flip": SloFlip,
}
