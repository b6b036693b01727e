"""Decides which workers shall change their roles: `handle(observation | tick, now) -> decisions`. Knows no store, no sockets and no clock.

Each look forecasts the load, values every split that is allowed by the good requests a second that it would bring, and changes roles when the
best one is worth the moves. What keeps it calm: a gain must be clear and must show at two looks in a row; there is a rest after each
change, a longer one before a change back; a worker that has switched rests; and switches are drawn from a budget.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.roles.candidates import Limits, moves_to, num_moves, splits_of
from cluster.roles.config import RolesConfig
from cluster.roles.forecasting import average, foretell
from cluster.roles.outlook import Costs, RoleTargets, goodput
from cluster.roles.values import Alternative, Decision, Effect, Forecast, Move, Observation, RoleSplit, split_of

STALE_S = 5.0
"""What was observed longer ago decides nothing."""
LEAST_REQUESTS_PER_S = 1e-3
"""Below that there is no load to decide for: a lull changes nothing."""
LEAST_RATE_GAIN = 0.03
"""A change must gain this share of what is asked, whatever is served of it now."""
MOVE_COST_S = 1.5
"""A worker that switches is taken to be of no use for so long."""
HORIZON_S = 30.0
"""Within which a change must have paid for its moves, twice over."""
URGENT_GAIN = 0.25
"""A gain of this share of what is asked is worth a change back at once."""
EFFECT_S = 30.0
"""So long after a decision its effect is measured."""
AHEAD_S = 8.0
"""The growth of what decodes over so many seconds is expected once more."""
NUM_ALTERNATIVES = 5
TOP_SHARE = 0.02
"""Of splits whose goodput is within this share of the best one, the one with the fewest moves is taken."""
MAX_MEASURED = 8
ENOUGH = 0.98
"""Of what is asked: so much must be served well by the number of workers that is published as desired."""
MAX_GROWTH = 4
"""The desired number of workers is looked for up to so many times the present one."""
SIZES_EVERY_S = 5.0
SAVED_SWITCHES = 2.0
"""Of the budget, for each worker: a load that shifts and comes back takes most workers along twice."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


class Planner(Protocol):
    """Decides on roles; RoleController, or another policy to compare it with."""

    last: Decision | None

    @property
    def desired_workers(self) -> int: ...

    def handle(self, event: Observation | Tick, now: float) -> list[Decision]: ...


class RoleController:
    """`now` is any clock in seconds that does not go back. What it remembers is bounded by the number of workers."""

    def __init__(self, config: RolesConfig, targets: RoleTargets, local_tokens: int = 0) -> None:
        self._config = config
        self._targets = targets
        self._local_tokens = local_tokens
        self._seen: Observation | None = None
        self._looked_s = float("-inf")
        self._direction = 0
        """Of the change that the last look asked for: above 0, more workers for prompts."""
        self._changed: tuple[float, int] | None = None
        """When roles were changed last, and in which direction."""
        self._rests: dict[str, float] = {}
        self._budget: float | None = None
        self._budget_s = 0.0
        self._num_decisions = 0
        self._unmeasured: deque[tuple[float, Decision, float]] = deque(maxlen=MAX_MEASURED)
        """Decisions whose effect has still to be measured, with answers a second at the time."""
        self._decoding: deque[tuple[float, int]] = deque(maxlen=256)
        """When so many sequences decoded."""
        self._desired = 0
        self._sized_s = float("-inf")
        self.last: Decision | None = None
        """Of the last look, whether anything was to change or not."""

    @property
    def desired_workers(self) -> int:
        """As many as the load of the last look needs; 0: it is not known."""
        return self._desired

    def handle(self, event: Observation | Tick, now: float) -> list[Decision]:
        """Decisions to change roles, or earlier ones whose effect is known by now."""
        if isinstance(event, Observation):
            self._seen = event
        seen = self._seen
        if seen is None or now - seen.at_s > STALE_S or now < self._looked_s + self._config.interval_s:
            return []
        self._looked_s = now
        forecast = self._ahead(foretell(seen, self._targets), now)
        measured = self._measure(seen, forecast, now)
        decision = self._look(seen, forecast, now)
        if decision is not None:
            self.last = decision
            if decision.moves:
                finished = sum(demand.finished_per_s for demand in seen.demands)
                self._unmeasured.append((now, decision, finished))
                measured.append(decision)
        return measured

    def _ahead(self, forecast: Forecast, now: float) -> Forecast:
        """Where more and more decode, as when answers have become longer, it is taken to go on for a while."""
        kept, count = self._decoding, forecast.num_sequences
        kept.append((now, count))
        while kept[0][0] < now - AHEAD_S:
            kept.popleft()
        before_s, before = kept[0]
        growth = (count - before) * AHEAD_S / max(AHEAD_S / 2, now - before_s)
        return replace(forecast, num_sequences=count + max(0, round(growth)))

    def _look(self, seen: Observation, forecast: Forecast, now: float) -> Decision | None:
        costs = average(seen, self._local_tokens)
        # Where a worker is on its way to another role, it counts there.
        usable = [worker for worker in seen.workers if worker.takes_work or worker.worker_id in seen.switching]
        roles = {worker.worker_id: seen.switching.get(worker.worker_id, worker.role) for worker in usable}
        split = split_of(roles.values())
        if costs is None or split.size < 2:
            return None
        may_move = self._may_move(seen, now) & roles.keys()
        fixed = split_of(role for worker_id, role in roles.items() if worker_id not in may_move)
        splits = splits_of(split, Limits(self._config.min_prefill, self._config.min_decode, fixed))
        if forecast.asked_per_s < LEAST_REQUESTS_PER_S:
            return self._decision(
                (), "nothing is asked", Alternative(split, 0.0), Alternative(split, 0.0), (), forecast
            )
        values = goodput(splits, forecast, costs, self._targets)
        self._size(split, forecast, costs, now)
        ranked = sorted(range(len(splits)), key=lambda at: -values[at])
        present = Alternative(split, float(values[0]))
        top = float(values[ranked[0]])
        close = [at for at in ranked if values[at] >= top * (1 - TOP_SHARE)]
        chosen = min(close, key=lambda at: (num_moves(split, splits[at]), -values[at]))
        best = Alternative(splits[chosen], float(values[chosen]))
        others = tuple(Alternative(splits[at], float(values[at])) for at in ranked[:NUM_ALTERNATIVES])
        count = num_moves(split, best.split)
        why_not = self._why_not(present, best, count, forecast, now)
        if why_not:
            return self._decision((), why_not, present, best, others, forecast)
        workers = [worker for worker in usable if worker.worker_id in roles]
        moves = moves_to(best.split, roles, workers, frozenset(may_move))
        moves = moves[: self._room(len(roles), len(seen.switching), now)]
        if not moves:
            return self._decision((), "no worker may switch now", present, best, others, forecast)
        self._note(moves, best.split, split, now)
        return self._decision(tuple(moves), _reason(forecast, split, best.split), present, best, others, forecast)

    def _why_not(self, present: Alternative, best: Alternative, count: int, forecast: Forecast, now: float) -> str:
        """Why roles stay as they are; empty: they change."""
        config, rate = self._config, forecast.requests_per_s or forecast.asked_per_s
        gain = best.goodput - present.goodput
        direction = _direction(present.split, best.split)
        before, self._direction = self._direction, direction if count else 0
        if not count:
            return "no other split is better"
        least = max(config.min_gain * present.goodput, LEAST_RATE_GAIN * rate)
        if gain < least:
            self._direction = 0
            return "the gain is not clear"
        cost = count * MOVE_COST_S * rate / present.split.size
        if gain * HORIZON_S < 2 * cost:
            return "the gain does not pay for the moves"
        if before != direction:
            return "seen for the first time"
        if self._changed is not None:
            changed_s, last = self._changed
            if now < changed_s + config.cooldown_s:
                return "roles have just changed"
            is_back = last * direction < 0
            if is_back and now < changed_s + config.reversal_s and gain < URGENT_GAIN * rate:
                return "roles have just changed the other way"
        return ""

    def _may_move(self, seen: Observation, now: float) -> frozenset[str]:
        self._rests = {worker_id: until_s for worker_id, until_s in self._rests.items() if until_s > now}
        return frozenset(
            worker.worker_id
            for worker in seen.workers
            if worker.takes_work
            and worker.worker_id not in seen.pinned
            and worker.worker_id not in seen.resting
            and worker.worker_id not in seen.switching
            and worker.worker_id not in self._rests
        )

    def _room(self, num_workers: int, num_switching: int, now: float) -> int:
        """Switches that may begin now: of the budget, and beside those that are under way."""
        most = SAVED_SWITCHES * num_workers
        if self._budget is None:
            self._budget, self._budget_s = most, now
        per_s = num_workers * self._config.switches_per_hour / 3600
        self._budget = min(most, self._budget + (now - self._budget_s) * per_s)
        self._budget_s = now
        at_once = max(1, math.ceil(self._config.max_at_once * num_workers)) - num_switching
        return max(0, min(at_once, int(self._budget)))

    def _note(self, moves: list[Move], target: RoleSplit, split: RoleSplit, now: float) -> None:
        assert self._budget is not None
        self._budget -= len(moves)
        self._changed = now, _direction(split, target)
        for move in moves:
            self._rests[move.worker_id] = now + self._config.worker_rest_s

    def _decision(
        self,
        moves: tuple[Move, ...],
        reason: str,
        now: Alternative,
        best: Alternative,
        others: tuple[Alternative, ...],
        forecast: Forecast,
    ) -> Decision:
        if moves:
            self._num_decisions += 1
        return Decision(self._num_decisions, moves, reason, now, best, others, forecast, self._desired)

    def _measure(self, seen: Observation, forecast: Forecast, now: float) -> list[Decision]:
        """Decisions of a while ago, with what has come of them."""
        known: list[Decision] = []
        while self._unmeasured and now >= self._unmeasured[0][0] + EFFECT_S:
            _, decision, finished = self._unmeasured.popleft()
            effect = Effect(
                decision.forecast.ttft_attainment,
                forecast.ttft_attainment,
                decision.forecast.tpot_attainment,
                forecast.tpot_attainment,
                finished,
                sum(demand.finished_per_s for demand in seen.demands),
            )
            known.append(replace(decision, effect=effect))
        return known

    def _size(self, split: RoleSplit, forecast: Forecast, costs: Costs, now: float) -> None:
        """The least number of workers that would serve the load well, split as well as can be."""
        if now < self._sized_s + SIZES_EVERY_S:
            return
        self._sized_s = now
        sizes = sorted({max(2, round(split.size * MAX_GROWTH ** (at / 8))) for at in range(-16, 9)})
        splits = [
            RoleSplit(count, size - count, 0)
            for size in sizes
            for count in sorted({min(size - 1, max(1, round(size * at / 8))) for at in range(1, 8)})
        ]
        values = goodput(splits, forecast, costs, self._targets)
        enough = [s.size for s, value in zip(splits, values, strict=True) if value >= ENOUGH * forecast.asked_per_s]
        self._desired = min(enough, default=sizes[-1])


def _direction(now: RoleSplit, then: RoleSplit) -> int:
    """1: to more workers for prompts; -1: for answers."""
    change = (then.prefill - then.decode) - (now.prefill - now.decode)
    return (change > 0) - (change < 0)


def _reason(forecast: Forecast, now: RoleSplit, then: RoleSplit) -> str:
    direction = _direction(now, then)
    if direction > 0:
        return "prompts wait" if forecast.backlog_tokens > 0 else "more is asked of prefill"
    return "answers are slow" if direction < 0 else "both sides share"
