"""What operators want: taken here or passed on to the leader, begun as switches, and answered. Knows no load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from cluster.roles.carrying_out import Execution
from cluster.roles.events import Answer, Command, Put, Remove, Write, Wrote
from cluster.roles.mirror import StoreMirror
from cluster.roles.records import ANSWERS, ORDERS, PINS, SWITCHES, encode
from cluster.roles.switches import OPERATOR, Phase, RoleSwitch
from cluster.store.store import ABSENT
from router.fleet.seen import WorkerSeen
from router.roles import Order

ORDER_S = 60.0
"""How long an order waits for a leader, and an answer for who asked."""
MAX_ORDERS = 256


class Orders:
    """Of one process. The leader begins what has come here or to others; each process answers what has come to it."""

    def __init__(self, mirror: StoreMirror, execution: Execution, name: str) -> None:
        self._mirror = mirror
        self._execution = execution
        self._name = name
        self._waiting: dict[str, tuple[Order, float]] = {}
        """That have come here and are not begun, with when."""
        self._passed: dict[str, tuple[str, float]] = {}
        """That were passed on to the leader, with the key of their entry, and when."""
        self._begun: dict[str, tuple[Order, bool]] = {}
        """Switches that are under way for an order; True: it came here."""

    def take(self, name: str, order: Order, leads: bool, now: float) -> list[Command]:
        """An order has come here."""
        if len(self._waiting) + len(self._passed) + len(self._begun) >= MAX_ORDERS:
            return [Answer(name, "too many orders are under way")]
        if leads:
            self._waiting[name] = order, now
            return []
        key = ORDERS + order.worker_id
        if any(key == other for other, _ in self._passed.values()):
            return [Answer(name, "another order for this worker is under way")]
        self._passed[name] = key, now
        value = encode({"name": name, "order": asdict(order)})
        return [Write(key, ABSENT, value, ORDER_S)]

    def passed_on(self, answer: Wrote) -> list[Command]:
        """An order is in the store for the leader, or another one for the same worker stands there."""
        name = next((name for name, (key, _) in self._passed.items() if key == answer.key), None)
        if name is None or answer.version is not None:
            return []
        del self._passed[name]
        why = "another order for this worker is under way"
        return [Answer(name, "the store does not answer, and roles do not change without it" if answer.failed else why)]

    def take_others(self, workers: Mapping[str, WorkerSeen], now: float) -> list[Command]:
        """Begins what waits here, and what other routers have passed on."""
        out: list[Command] = []
        for name, (order, _) in list(self._waiting.items()):
            if order.worker_id not in self._execution.running:
                del self._waiting[name]
                out += self._begin(name, order, True, workers, now)
        for entry, name, order in self._mirror.orders():
            if order.worker_id not in self._execution.running and name not in self._begun:
                out += [Remove(entry.key, entry.version), *self._begin(name, order, False, workers, now)]
        return out

    def _begin(
        self, name: str, order: Order, is_ours: bool, workers: Mapping[str, WorkerSeen], now: float
    ) -> list[Command]:
        out: list[Command] = []
        if order.is_pinned is not None:
            key = PINS + order.worker_id
            out.append(Put(key, "true") if order.is_pinned else Remove(key))
        worker = workers.get(order.worker_id)
        if order.role is None and order.is_draining is None:
            return [*out, self._answered(name, is_ours, "")]
        if worker is None or not worker.is_up:
            return [self._answered(name, is_ours, f"worker {order.worker_id!r} is not connected")]
        target = order.role or worker.role
        is_drained = worker.is_draining if order.is_draining is None else order.is_draining
        if target is worker.role and is_drained is worker.is_draining:
            return [*out, self._answered(name, is_ours, "")]
        switch = RoleSwitch(
            name,
            order.worker_id,
            worker.role,
            target,
            worker.generation,
            _reason(order),
            OPERATOR,
            is_drained,
            worker.is_draining,
            order.force,
        )
        self._begun[name] = order, is_ours
        return [*out, *self._execution.begin(switch, self._mirror.version(SWITCHES + order.worker_id), now)]

    def answers(self, leads: bool, now: float) -> list[Command]:
        """What is known by now of orders."""
        out: list[Command] = []
        while self._execution.ended:
            switch = self._execution.ended.popleft()
            begun = self._begun.pop(switch.number, None)
            if begun is not None:
                error = "" if switch.phase is Phase.DONE else switch.why or "it was rolled back"
                out.append(self._answered(switch.number, begun[1], error))
        if not leads:
            # Whoever leads now goes on with them; the store has what becomes of them.
            self._passed |= {name: ("", now) for name, (_, is_ours) in self._begun.items() if is_ours}
            self._begun.clear()
            for name, (order, _) in list(self._waiting.items()):
                del self._waiting[name]
                out += self.take(name, order, False, now)
        for name, (_, asked_s) in list(self._passed.items()):
            error_known = self._known(name)
            if error_known is not None:
                del self._passed[name]
                out.append(Answer(name, error_known))
            elif now >= asked_s + ORDER_S:
                del self._passed[name]
                out.append(Answer(name, "no role controller has carried it out in time; see `baton roles`"))
        return out

    def _known(self, name: str) -> str | None:
        """What the store says of an order that another process carries out."""
        answer = self._mirror.answer(name)
        if answer is not None:
            return answer
        for switch in self._mirror.switches.values():
            if switch.number == name and switch.is_over:
                return "" if switch.phase is Phase.DONE else switch.why or "it was rolled back"
        return None

    def _answered(self, name: str, is_ours: bool, error: str) -> Command:
        return Answer(name, error) if is_ours else Put(ANSWERS + name, encode({"error": error}), ORDER_S)


def _reason(order: Order) -> str:
    if order.role is not None:
        return "asked for"
    return "asked to drain" if order.is_draining else "asked to take work"
