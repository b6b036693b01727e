"""Carries switches out, phase by phase: each phase is in the store before what belongs to it is done. Only the leader's runs. Knows no load."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cluster.roles.config import RolesConfig
from cluster.roles.events import Command, Put, SetDraining, SetRole, Write, Wrote
from cluster.roles.mirror import StoreMirror
from cluster.roles.records import AUDIT, SWITCHES, AuditRecord, encode
from cluster.roles.switches import EFFECTS, OPERATOR, SWITCH, Effect, Phase, RoleSwitch, Turn, judge, why_of
from cluster.store.store import ABSENT
from router.fleet.seen import WorkerSeen
from workers.status import Role

AGAIN_S = 1.0
"""What does not show is done again after this long."""
MAX_TIMES = 512
"""Of each phase, for its quantiles."""


@dataclass(slots=True)
class Running:
    """A switch that is not over."""

    switch: RoleSwitch
    version: int | None
    """Of its entry in the store; None: the phase is being written."""
    base: int
    """Of the entry over which the phase is written."""
    before: RoleSwitch | None = None
    """What it was before that."""
    since_s: float = 0.0
    """When the last phase that is in the store began."""
    writing_s: float = 0.0
    """Since when the phase is being written."""
    acted_s: float = float("-inf")
    """When the phase's effect was last asked for."""
    written_s: float = 0.0
    """When it was sent to the store last."""


class Execution:
    """All switches that are under way, one a worker. `wall_s(now)` is the time since 1970."""

    def __init__(self, config: RolesConfig, leader: str, wall_s: Callable[[float], float]) -> None:
        self._config = config
        self._leader = leader
        self._wall_s = wall_s
        self.running: dict[str, Running] = {}
        self.ended: deque[RoleSwitch] = deque(maxlen=1024)
        """Taken by whoever answers orders."""
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        self.phase_s: dict[str, deque[float]] = {}
        self.next_audit = 1
        self._versions: dict[str, int] = {}
        """Of the entries that were written here last, which the mirror may not show yet."""
        self._mended: dict[str, float] = {}
        """By worker: when it was last told so."""

    @property
    def switching(self) -> dict[str, Role]:
        return {worker_id: running.switch.target for worker_id, running in self.running.items()}

    def begin(self, switch: RoleSwitch, version: int, now: float) -> list[Command]:
        """Intends a switch. `version` is that of the worker's entry for its last one."""
        switch = replace(switch, at_s=self._wall_s(now))
        base = max(version, self._versions.get(switch.worker_id, ABSENT))
        running = self.running[switch.worker_id] = Running(switch, None, base, None, now, now)
        return [self._write(running, now)]

    def take_over(self, mirror: StoreMirror, now: float) -> list[Command]:
        """This one leads from now on: what the store has under way goes on here; what a store has forgotten is written again."""
        self.running.clear()
        self._versions.clear()
        out: list[Command] = [Put(key, value) for key, value in sorted(mirror.lost.items())]
        audit = mirror.audit()
        if audit:
            self.next_audit = int(str(audit[-1]["number"])) + 1
        return out + self._adopt(mirror, now)

    def _adopt(self, mirror: StoreMirror, now: float) -> list[Command]:
        """What the store has under way and nobody carries out: an earlier leader's."""
        out: list[Command] = []
        for worker_id, switch in mirror.switches.items():
            version = mirror.version(SWITCHES + worker_id)
            is_new = version > self._versions.get(worker_id, ABSENT)
            if not switch.is_over and is_new and worker_id not in self.running:
                self.running[worker_id] = Running(switch, version, version, None, now)
                self._versions[worker_id] = version
                out.append(self._audit(switch, "taken over", now))
        return out

    def give_up(self) -> None:
        """Another one leads."""
        self.running.clear()

    def wrote(self, answer: Wrote, now: float) -> list[Command]:
        """A phase is in the store. Without a version it may be there all the same, since it may have been written twice, or another one's write is:
        the mirror tells."""
        worker_id = answer.key.removeprefix(SWITCHES)
        if answer.version is None:
            return []
        self._versions[worker_id] = max(answer.version, self._versions.get(worker_id, ABSENT))
        running = self.running.get(worker_id)
        if running is None or running.version is not None or answer.value != encode(running.switch):
            return []  # it answers what is over: the mirror has shown it before
        return self._entered(running, answer.version, now)

    def _entered(self, running: Running, version: int, now: float) -> list[Command]:
        switch, before = running.switch, running.before
        running.version = self._versions[switch.worker_id] = version
        took_s = now - running.since_s if before is not None else 0.0
        running.since_s, running.acted_s = now, float("-inf")
        if before is not None:
            self.phase_s.setdefault(before.phase.value, deque(maxlen=MAX_TIMES)).append(took_s)
        if switch.is_over:
            return self._end(switch, now, took_s)
        return [self._audit(switch, switch.phase.value, now, took_s)]

    def _end(self, switch: RoleSwitch, now: float, took_s: float = 0.0) -> list[Command]:
        del self.running[switch.worker_id]
        self.counts[switch.source.value, switch.target.value, switch.by, switch.phase.value] += 1
        self.ended.append(switch)
        return [self._audit(switch, switch.phase.value, now, took_s)]

    def advance(self, workers: Mapping[str, WorkerSeen], mirror: StoreMirror, now: float) -> list[Command]:
        """Looks at every switch, and does what is due."""
        out = self._adopt(mirror, now)
        for running in list(self.running.values()):
            if running.version is None:
                out += self._find(running, workers, mirror, now)
                continue
            worker = workers.get(running.switch.worker_id)
            turn = judge(running.switch, worker, self._is_safe(running.switch, workers), self._is_late(running, now))
            if turn is not None:
                out += self._go_on(running, turn, now)
            elif worker is not None and worker.is_up and now >= running.acted_s + AGAIN_S:
                effects = self._effects(running.switch, worker)
                if effects:
                    running.acted_s = now
                    out += effects
        return out + self._mend(workers, mirror, now)

    def _find(
        self, running: Running, workers: Mapping[str, WorkerSeen], mirror: StoreMirror, now: float
    ) -> list[Command]:
        """A phase that is being written: it is there by now, another one's is, or it is written again, but not for ever."""
        switch = running.switch
        known, version = mirror.switches.get(switch.worker_id), mirror.version(SWITCHES + switch.worker_id)
        if known == switch:
            return self._entered(running, version, now)
        if version > running.base:
            may_go_over = known in (None, running.before) or (running.before is None and known.is_over)
            if not may_go_over:
                del self.running[switch.worker_id]
                why = "another controller has changed it"
                self.ended.append(replace(switch, phase=Phase.ROLLED_BACK, why=why))
                return []
            running.base = version
        elif now < running.written_s + AGAIN_S:
            return []
        elif version == ABSENT:
            running.base = ABSENT  # its entry is gone: a cluster has begun anew on this store, or the entry was damaged
        if running.written_s >= running.writing_s + self._config.step_timeout_s:
            return self._let_go(running, workers.get(switch.worker_id), now)
        return [self._write(running, now)]

    def _let_go(self, running: Running, worker: WorkerSeen | None, now: float) -> list[Command]:
        """The store does not take the phase. The worker takes work again if this switch has had it take none; that may take as long again."""
        switch, before = running.switch, running.before
        drained_here = switch.drained_here and before is not None and before.drained_here and not switch.was_drained
        is_held = drained_here and worker is not None and worker.is_up and worker.is_draining
        if is_held and now < running.writing_s + 2 * self._config.step_timeout_s:
            if now < running.acted_s + AGAIN_S:
                return []
            running.acted_s = now
            return [SetDraining(switch.worker_id, False)]
        return self._end(replace(switch, phase=Phase.ROLLED_BACK, why="the store did not take it in time"), now)

    def _write(self, running: Running, now: float) -> Write:
        running.written_s = now
        return Write(SWITCHES + running.switch.worker_id, running.base, encode(running.switch))

    def _go_on(self, running: Running, turn: Turn, now: float) -> list[Command]:
        switch = running.switch
        step = SWITCH.step(switch.phase, turn)
        why = why_of(turn, switch) if step.to in (Phase.UNDOING, Phase.ROLLED_BACK) and not switch.why else ""
        assert running.version is not None
        running.base, running.version, running.before, running.writing_s = running.version, None, switch, now
        running.switch = switch.entered(step.to, turn, self._wall_s(now), why)
        return [self._write(running, now)]

    def _is_late(self, running: Running, now: float) -> bool:
        bound_s = (
            self._config.drain_timeout_s if running.switch.phase is Phase.DRAINING else self._config.step_timeout_s
        )
        return now >= running.since_s + bound_s

    def _is_safe(self, switch: RoleSwitch, workers: Mapping[str, WorkerSeen]) -> bool:
        """Without the worker, and those that are on their way, enough others can still do what it did."""
        others = [
            worker
            for worker in workers.values()
            if worker.takes_work and worker.worker_id != switch.worker_id and worker.worker_id not in self.running
        ]
        target = switch.target if not switch.is_drained else None
        is_order = switch.by == OPERATOR
        least_prefill, least_decode = (1, 1) if is_order else (self._config.min_prefill, self._config.min_decode)
        num_prefill = sum(worker.role.can_prefill for worker in others) + (target is not None and target.can_prefill)
        num_decode = sum(worker.role.can_decode for worker in others) + (target is not None and target.can_decode)
        gives_prefill = switch.source.can_prefill and not (target is not None and target.can_prefill)
        gives_decode = switch.source.can_decode and not (target is not None and target.can_decode)
        return not (gives_prefill and num_prefill < least_prefill) and not (gives_decode and num_decode < least_decode)

    def _effects(self, switch: RoleSwitch, worker: WorkerSeen) -> list[Command]:
        """What belongs to the phase and does not show yet."""
        name = worker.worker_id
        match EFFECTS.get(switch.phase):
            case Effect.DRAIN:
                return [] if worker.is_draining else [SetDraining(name, True)]
            case Effect.FENCE:
                return [] if worker.role is switch.target else [SetRole(name, switch.target, worker.generation)]
            case Effect.SERVE:
                return [] if worker.is_draining is switch.is_drained else [SetDraining(name, switch.is_drained)]
            case Effect.RESTORE:
                out: list[Command] = []
                if worker.role is not switch.source:
                    out.append(SetRole(name, switch.source, worker.generation))
                if worker.is_draining is not switch.was_drained:
                    out.append(SetDraining(name, switch.was_drained))
                return out
        return []

    def _mend(self, workers: Mapping[str, WorkerSeen], mirror: StoreMirror, now: float) -> list[Command]:
        """A worker that was lost while a switch drained it comes back drained, when the switch is over: it is to take work again."""
        out: list[Command] = []
        for worker_id, switch in mirror.switches.items():
            worker = workers.get(worker_id)
            if not switch.is_over or not switch.drained_here or worker_id in self.running:
                continue
            if worker is None or not worker.is_up or now < self._mended.get(worker_id, float("-inf")) + AGAIN_S:
                continue
            self._mended[worker_id] = now
            if worker.is_draining and not switch.was_drained:
                out.append(SetDraining(worker_id, False))
            else:
                key = SWITCHES + worker_id
                out.append(Write(key, mirror.version(key), encode(replace(switch, drained_here=False))))
        return out

    def _audit(self, switch: RoleSwitch, step: str, now: float, took_s: float = 0.0) -> Put:
        number = self.next_audit
        self.next_audit += 1
        record = AuditRecord(
            number, round(self._wall_s(now), 3), switch.number, switch.worker_id, step, switch.source.value,
            switch.target.value, switch.by, switch.reason, round(took_s, 6), self._leader, switch.why,
        )  # fmt: skip
        return Put(f"{AUDIT}{number % self._config.audit_records}", encode(record))
