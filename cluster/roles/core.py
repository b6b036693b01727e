"""Decides everything that a cluster's role controller decides: `handle(event, now) -> commands`. Knows no store client, no sockets and no clock.

Each router has one. They agree on a leader by a lease; the others measure, pass orders on, and take over where the leader left off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from cluster.roles.carrying_out import Execution
from cluster.roles.config import RolesConfig
from cluster.roles.events import (
    Command,
    Event,
    Looked,
    Ordered,
    Put,
    Renewed,
    Resign,
    Say,
    StoreSeen,
    Tick,
    Wrote,
)
from cluster.roles.leadership import Leadership
from cluster.roles.mirror import StoreMirror
from cluster.roles.orders import Orders
from cluster.roles.planner import Planner
from cluster.roles.records import DECISIONS, DEMANDS, LEADER, ORDERS, SWITCHES, decision_page, encode
from cluster.roles.switches import OPERATOR, RoleSwitch
from cluster.roles.values import Decision, Observation
from router.fleet.seen import WorkerSeen
from router.requests.demand import DemandReport

STALE_S = 3.0
"""What the router saw longer ago is nothing to act on."""
_NO_RECORD = "the store's entry {!r:.100} is no record of roles and does not count"
DEMAND_LEASES = 6
"""A router's measures count for so many intervals."""


class RolesCore:
    """`name` is the router's; `wall_s(now)` is the time since 1970. `make_planner` makes the policy that decides, anew for each time as the leader."""

    def __init__(
        self,
        config: RolesConfig,
        name: str,
        make_planner: Callable[[], Planner],
        lease_ttl_s: float,
        wall_s: Callable[[float], float],
    ) -> None:
        self.config = config
        self.name = name
        self._wall_s = wall_s
        self._most_workers = 0
        """That were there at once: the default mode goes by them."""
        self.leadership = Leadership(name, lease_ttl_s)
        self.mirror = StoreMirror()
        self.execution = Execution(config, name, wall_s)
        self._make_planner = make_planner
        self.planner = make_planner()
        self._orders = Orders(self.mirror, self.execution, name)
        self.workers: dict[str, WorkerSeen] = {}
        self._demand: DemandReport | None = None
        self._demand_s = float("-inf")
        self._handoff_s = 0.0
        self._looked_s = float("-inf")
        self._was_leading = False
        self._num_before = 0
        """Decisions of earlier leaders: those of this one are numbered after them."""
        self.gains: tuple[float, float] = (0.0, 0.0)
        """Predicted by the last decision, and measured after the last one whose effect is known: good requests a second."""

    def leads(self, now: float) -> bool:
        return self.leadership.leads(now)

    @property
    def acts(self) -> bool:
        """The controller changes roles by itself, when it leads."""
        return self.config.acts_on(self._most_workers)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes one event and returns what to do, in this order."""
        out: list[Command] = []
        match event:
            case StoreSeen(snapshot):
                out += [Say(_NO_RECORD.format(key)) for key in sorted(self.mirror.take(snapshot))]
                self.leadership.seen(self.mirror.leader)
            case Wrote(key) if key == LEADER:
                self.leadership.wrote(event, now)
            case Wrote(key) if key.startswith(ORDERS):
                out += self._orders.passed_on(event)
            case Wrote():
                out += self.execution.wrote(event, now)
            case Renewed():
                self.leadership.renewed(event, now)
            case Looked(workers, demand, handoff_s):
                self.workers = {worker.worker_id: worker for worker in workers}
                self._most_workers = max(self._most_workers, len(workers))
                self._demand, self._handoff_s, self._looked_s = demand, handoff_s, now
            case Ordered(name, order):
                out += self._orders.take(name, order, self.leads(now), now)
            case Tick():
                pass
            case Resign():
                out += self.leadership.resign()
            case _:
                assert_never(event)
        if not isinstance(event, Resign):
            out += self._go_on(now)
        return out

    def _go_on(self, now: float) -> list[Command]:
        out: list[Command] = []
        if self.mirror.is_seen:
            out += self.leadership.tick(now)
        out += self._tell_demand(now)
        leads = self.leads(now)
        if leads and not self._was_leading:
            out.append(Say(f"{self.name} leads the roles of the workers"))
            self.planner = self._make_planner()  # what an earlier one remembers is old
            self._num_before = max((int(str(kept["number"])) for kept in self.mirror.decisions()), default=0)
            out += self.execution.take_over(self.mirror, now)
        elif self._was_leading and not leads:
            out.append(Say(f"{self.name} does not lead the roles of the workers any more"))
            self.execution.give_up()
        self._was_leading = leads
        if leads:
            out += self._lead(now)
        out += self._orders.answers(leads, now)
        return out

    def _lead(self, now: float) -> list[Command]:
        if now > self._looked_s + STALE_S:
            return []
        out = self._orders.take_others(self.workers, now)
        out += self._plan(now)
        return out + self.execution.advance(self.workers, self.mirror, now)

    def _tell_demand(self, now: float) -> list[Command]:
        if self._demand is None or now < self._demand_s + self.config.interval_s:
            return []
        self._demand_s = now
        return [Put(DEMANDS + self.name, encode(self._demand), DEMAND_LEASES * self.config.interval_s)]

    def _plan(self, now: float) -> list[Command]:
        if not self.config.watches(self._most_workers):
            return []
        demands = dict(self.mirror.demands)
        if self._demand is not None:
            demands[self.name] = self._demand
        observation = Observation(
            self._looked_s,
            tuple(self.workers.values()),
            tuple(demands[name] for name in sorted(demands)),
            self.mirror.pinned,
            self._resting(now),
            self.execution.switching,
            self._handoff_s,
        )
        out: list[Command] = []
        for decision in self.planner.handle(observation, now):
            out += self._decided(decision, now)
        return out

    def _resting(self, now: float) -> frozenset[str]:
        """Workers that were switched not long ago, as the store remembers."""
        wall_s, config = self._wall_s(now), self.config
        return frozenset(
            worker_id
            for worker_id, switch in self.mirror.switches.items()
            if switch.rests(wall_s, config.manual_rest_s if switch.by == OPERATOR else config.worker_rest_s)
        )

    def _decided(self, decision: Decision, now: float) -> list[Command]:
        acts = self.acts
        numbered = replace(decision, number=self._num_before + decision.number)
        page = decision_page(numbered, self._wall_s(now), "auto" if acts else "advise")
        out: list[Command] = []
        if decision.effect is not None:
            effect = decision.effect
            before = effect.finished_before * min(effect.ttft_before, effect.tpot_before)
            after = effect.finished_after * min(effect.ttft_after, effect.tpot_after)
            self.gains = self.gains[0], after - before
            return [self._keep(page)]
        self.gains = decision.gain, self.gains[1]
        moves = ", ".join(f"{move.worker_id} from {move.source} to {move.target}" for move in decision.moves)
        gain = f"{decision.best.goodput:.2f} good requests a second instead of {decision.now.goodput:.2f}"
        out += [self._keep(page), Say(f"{'switches' if acts else 'would switch'} {moves}: {decision.reason}; {gain}")]
        if not acts:
            return out
        for at, move in enumerate(decision.moves):
            worker = self.workers[move.worker_id]
            number = f"{self.name}-{self._wall_s(now):.3f}-{at}"
            switch = RoleSwitch(
                number,
                move.worker_id,
                move.source,
                move.target,
                worker.generation,
                decision.reason,
                was_drained=worker.is_draining,
            )
            out += self.execution.begin(switch, self.mirror.version(SWITCHES + move.worker_id), now)
        return out

    def _keep(self, page: dict[str, object]) -> Put:
        return Put(f"{DECISIONS}{int(str(page['number'])) % self.config.decisions}", encode(page))
