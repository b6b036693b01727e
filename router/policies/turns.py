"""Policies that look at no load: workers in turn, or at random; simple to predict, and the yardsticks for the others."""

from __future__ import annotations

import numpy as np
import xxhash

from router.fleet.worker_table import Flags
from router.policies.policy import Candidates, Demand, Route, Weighed


class RoundRobinPolicy:
    """Decode workers in turn; prefill workers in turn; a decode worker that can prefill (MIXED) does both."""

    def __init__(self, max_prefill_candidates: int = 3) -> None:
        self._max_prefill_candidates = max_prefill_candidates
        self._turn = 0

    def route(self, demand: Demand, candidates: Candidates) -> Route | None:
        turn = self._turn
        route = _turned(demand, candidates, turn, turn, self._max_prefill_candidates)
        self._turn += route is not None
        return route

    def weigh(self, demand: Demand, candidates: Candidates) -> tuple[tuple[Weighed, ...], tuple[Weighed, ...]]:
        return _alike(candidates)


class RandomPolicy:
    """Any worker as well as any other, the same ones again for the same seed."""

    def __init__(self, max_prefill_candidates: int = 3, seed: int = 0) -> None:
        self._max_prefill_candidates = max_prefill_candidates
        self._seed = seed
        self._turn = 0

    def route(self, demand: Demand, candidates: Candidates) -> Route | None:
        turns = drawn(self._seed, 2 * self._turn), drawn(self._seed, 2 * self._turn + 1)
        route = _turned(demand, candidates, *turns, self._max_prefill_candidates)
        self._turn += route is not None
        return route

    def weigh(self, demand: Demand, candidates: Candidates) -> tuple[tuple[Weighed, ...], tuple[Weighed, ...]]:
        return _alike(candidates)


def drawn(seed: int, place: int) -> int:
    """The random number at a place of a sequence that a seed names."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{place}".encode())


def _turned(demand: Demand, candidates: Candidates, decode_turn: int, prefill_turn: int, most: int) -> Route | None:
    decoders = _others(candidates.decodes, demand.avoid)
    if not len(decoders):
        return None
    decode = int(decoders[decode_turn % len(decoders)])
    prefillers = np.flatnonzero(candidates.prefills)
    prefillers = prefillers[prefillers != decode]
    if candidates.computes[decode] or not len(prefillers):
        return Route(decode)
    turned = np.roll(prefillers, -(prefill_turn % len(prefillers)))
    return Route(decode, tuple(int(row) for row in turned[:most]))


def _others(may: Flags, avoid: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    rows = np.flatnonzero(may)
    return rows[rows != avoid] if len(rows) > 1 else rows


def _alike(candidates: Candidates) -> tuple[tuple[Weighed, ...], tuple[Weighed, ...]]:
    cached = candidates.prefixes.cached

    def shown(may: Flags) -> tuple[Weighed, ...]:
        return tuple(Weighed(int(row), True, int(cached[row])) for row in np.flatnonzero(may))

    return shown(candidates.decodes), shown(candidates.prefills)
