"""A policy that is put together from filters and scorers: the decode worker with the least cost, then who computes the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.fleet.worker_table import Flags, Seconds
from router.policies.outlook import Outlook
from router.policies.policy import Candidates, Demand, Part, Reason, Route, Weighed, tie_break
from router.policies.scorers import Filter, Scorer


@dataclass(frozen=True, slots=True)
class ComposedPolicy:
    """Costs are added up in the order in which they are named; workers that cost the same are ordered by `tie_break`.

    The chosen worker computes the prompt itself where it may and that costs no more than having it computed elsewhere and moved
    (`weighs_places`), or wherever it may.
    """

    decode: tuple[Scorer, ...]
    prefill: tuple[Scorer, ...]
    filters: tuple[Filter, ...] = ()
    """Of decode workers, each of what the one before left; of prefill workers, the first of them."""
    weighs_places: bool = True
    max_prefill_candidates: int = 3

    def route(self, demand: Demand, candidates: Candidates) -> Route | None:
        if not candidates.decodes.any():
            return None
        outlook = Outlook(demand, candidates)
        may = outlook.decodes if self.weighs_places else candidates.decodes
        if not may.any():
            return None
        for keeps in self.filters:
            may = keeps(outlook, may)
        (decode,) = _first(outlook, may, self._cost(outlook, self.decode), 1)
        others = candidates.prefills.copy()
        others[decode] = False
        if self.filters:
            others = self.filters[0](outlook, others)
        count = max(1, self.max_prefill_candidates)
        prefill = _first(outlook, others, self._cost(outlook, self.prefill), count) if others.any() else []
        is_local = not prefill or self._is_local(outlook, decode)
        foretold = self._foretold(outlook, decode, prefill, is_local)
        chosen = () if is_local else tuple(prefill[: self.max_prefill_candidates])
        return Route(decode, chosen, *foretold, _reason(outlook, may, chosen[0] if chosen else decode))

    def weigh(self, demand: Demand, candidates: Candidates) -> tuple[tuple[Weighed, ...], tuple[Weighed, ...]]:
        outlook = Outlook(demand, candidates)
        may = candidates.decodes
        for keeps in self.filters:
            may = keeps(outlook, may)
        decode = _weighed(outlook, candidates.decodes, may, self.decode)
        return decode, _weighed(outlook, candidates.prefills, candidates.prefills, self.prefill)

    def _cost(self, outlook: Outlook, scorers: tuple[Scorer, ...]) -> Seconds:
        cost = np.zeros(len(outlook.table))
        for scorer in scorers:
            cost = cost + scorer(outlook)
        return cost

    def _is_local(self, outlook: Outlook, decode: int) -> bool:
        if not self.weighs_places:
            return bool(outlook.candidates.computes[decode])
        return bool(outlook.local_cost_s[decode] <= outlook.remote_cost_s[decode])

    def _foretold(self, outlook: Outlook, decode: int, prefill: list[int], is_local: bool) -> tuple[float, float]:
        ttft_s = outlook.prefill_s[decode] if is_local else outlook.prefill_s[prefill[0]] + outlook.handoff_s[decode]
        return float(ttft_s), float(outlook.tpot_s[decode])


def _reason(outlook: Outlook, may: Flags, computes: int) -> Reason:
    """`computes`: the worker that computes the prompt."""
    cached = outlook.candidates.prefixes.cached
    if may.sum() == 1 and outlook.candidates.prefills.sum() <= 1:
        return Reason.ONLY_CANDIDATE
    return Reason.CACHED_PREFIX if 0 < cached[computes] == cached.max() else Reason.LEAST_COST


def _first(outlook: Outlook, may: Flags, cost: Seconds, count: int) -> list[int]:
    """The `count` best of the workers that may, the best first."""
    cost = np.where(may, cost, np.inf)
    place = min(count, len(cost)) - 1
    worst = cost.min() if count == 1 else np.partition(cost, place)[place]
    places = np.flatnonzero((cost <= worst) & may)
    if len(places) > 1:
        ties = tie_break(outlook.demand.tie_key, outlook.table.seeds[places])
        places = places[np.lexsort((ties, cost[places]))]
    return [int(row) for row in places[:count]]


def _weighed(outlook: Outlook, shown: Flags, may: Flags, scorers: tuple[Scorer, ...]) -> tuple[Weighed, ...]:
    parts = [(scorer.__name__, scorer(outlook)) for scorer in scorers]
    cached = outlook.candidates.prefixes.cached
    weighed = [
        Weighed(
            row=int(row),
            is_kept=bool(may[row]),
            num_cached_blocks=int(cached[row]),
            parts=tuple(Part(name, float(cost[row])) for name, cost in parts),
        )
        for row in np.flatnonzero(shown)
    ]
    return tuple(weighed)
