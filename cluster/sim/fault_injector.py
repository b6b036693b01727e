"""Inflicts faults on the parts of a simulation, each at its time. What a fault is stands in faults.py."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.sim.faults import Fault
from cluster.sim.product import Order, Role, worker_events
from cluster.sim.record import FaultRecord
from cluster.sim.worker import SimWorker

if TYPE_CHECKING:
    from cluster.sim.simulation import Simulation


class FaultInjector:
    """Each fault once. `seed` decides which messages a lossy network loses."""

    def __init__(self, sim: Simulation, seed: int) -> None:
        self._sim = sim
        self._rng = random.Random(seed)
        self.num_inflicted = 0

    def inflict(self, fault: Fault) -> None:
        """The time of a fault has come."""
        self.num_inflicted += 1
        for worker in self._sim.workers.values():
            worker.loop.catch_up()
        self._sim.record.faults.append(FaultRecord(fault.at_s, fault.kind, fault.target, str(fault)))
        self._sim.note(f"fault: {str(fault).split(' ', 1)[1]}")
        after, network = self._sim.timeline.after, self._sim.network
        match fault.kind:
            case "kill":
                for name in sorted(fault.targets):
                    self._sim.kill(name, fault.restart_s)
            case "hang":
                for worker in self._workers(fault):
                    worker.freeze()
                    after(fault.for_s, worker.thaw)
            case "slow":
                for worker in self._workers(fault):
                    worker.loop.runner.slowness = fault.factor
                    after(fault.for_s, self._slow, worker, 1.0)
            case "cut":
                others = frozenset(fault.others.split(",")) if fault.others else None
                after(fault.for_s, network.mend, network.cut(fault.targets, others))
            case "late":
                after(fault.for_s, network.mend, network.delay(fault.targets, fault.by_s))
            case "lose":
                draw = self._rng.random
                after(fault.for_s, network.mend, network.drop(fault.targets, lambda: draw() < fault.share))
            case "store":
                self._sim.store.go_away()
                after(fault.for_s, self._sim.store.come_back, fault.is_empty)
            case "switch" | "drain" | "undrain" | "pin" | "unpin" if self._sim.roles:
                for name in sorted(fault.targets):
                    self._order(name, fault)
            case "switch":
                for worker in self._workers(fault):
                    self._sim.tell(worker, worker_events.SwitchRole(Role(fault.role)))
            case "drain" | "undrain":
                for worker in self._workers(fault):
                    self._sim.tell(worker, worker_events.SetDrain(fault.kind == "drain"))

    def _order(self, worker_id: str, fault: Fault) -> None:
        """An operator asks the first router that lives."""
        order = Order(worker_id, force=True)
        match fault.kind:
            case "switch":
                order = replace(order, role=Role(fault.role))
            case "drain" | "undrain":
                order = replace(order, is_draining=fault.kind == "drain")
            case _:
                order = replace(order, is_pinned=fault.kind == "pin")
        for name, router in sorted(self._sim.routers.items()):
            if not router.is_dead:
                self._sim.roles[name].order(order)
                return

    def _workers(self, fault: Fault) -> list[SimWorker]:
        return [self._sim.workers[name] for name in sorted(fault.targets) if not self._sim.workers[name].is_dead]

    def _slow(self, worker: SimWorker, factor: float) -> None:
        worker.loop.catch_up()
        worker.loop.runner.slowness = factor
