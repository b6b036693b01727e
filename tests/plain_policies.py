"""Every policy as a plain loop over one worker after another, written from its description: what the vector operations are held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from router.policies.policy import Demand
from router.policies.scorers import AWAY_FROM_HOME_S, LATE, MISSING_BLOCK_S
from router.policies.turns import drawn

Answer = tuple[int, tuple[int, ...]] | None


@dataclass(frozen=True)
class Plain:
    """One worker. `unit`: seconds of a step, a decode, a token of context, a prompt token, a token looked back at."""

    row: int
    decodes: bool
    prefills: bool
    can_decode: bool
    computes: bool
    is_short: bool
    num_sequences: int
    prefill_tokens: int
    free_blocks: int
    cached: int
    in_pool: int
    batch_tokens: int
    last_decodes: int
    last_context: int
    unit: tuple[float, float, float, float, float]
    looked_back: float
    lent_s: float
    tie: int


@dataclass(frozen=True)
class Prices:
    handoff_s: float
    handoff_block_s: float
    lower_tier_tokens: int


class PlainPolicy:
    """The answers of all policies but those that take turns, for one request."""

    def __init__(self, demand: Demand, workers: list[Plain], prices: Prices, num_prefill: int) -> None:
        self.demand, self.workers, self.prices, self.num_prefill = demand, workers, prices, num_prefill

    # ---- seconds ----

    def uncached(self, w: Plain) -> int:
        return max(1, self.demand.num_prompt_tokens - w.cached * self.demand.block_size)

    def decoding(self, w: Plain) -> float:
        return min(float(w.last_decodes), w.num_sequences)

    def context(self, w: Plain) -> float:
        return w.last_context / max(1.0, w.last_decodes)

    def step_s(self, w: Plain) -> float:
        return w.unit[0] + self.decoding(w) * (w.unit[1] + self.context(w) * w.unit[2])

    def chunk(self, w: Plain) -> float:
        return max(64, (w.batch_tokens or 512) - self.decoding(w))

    def own_prefill_s(self, w: Plain) -> float:
        before = self.demand.num_prompt_tokens - self.uncached(w) + 0.5 * self.uncached(w)
        own = self.uncached(w) * (self.step_s(w) / self.chunk(w) + w.unit[3] + before * w.unit[4])
        return own + (w.cached - w.in_pool) * (self.prices.lower_tier_tokens * w.unit[3])

    def prefill_s(self, w: Plain) -> float:
        queued = w.prefill_tokens * (self.step_s(w) / self.chunk(w) + w.unit[3] + w.looked_back * w.unit[4])
        return self.step_s(w) + queued + self.own_prefill_s(w)

    def lent(self, w: Plain) -> float:
        return min(0.9, w.lent_s / 5.0) if w.num_sequences > 0 else 0.0

    def strain(self, w: Plain) -> float:
        """How much of the time for prompts that the target leaves is used with this one."""
        if not self.demand.tpot_s:
            return 1.0
        lent = self.lent(w) + (self.prefill_s(w) - self.step_s(w)) / 5.0
        left = 1 - self.step_s(w) / (0.9 * self.demand.tpot_s)
        return lent / left if left > lent else 1.0

    def compute_s(self, w: Plain) -> float:
        return self.prefill_s(w) + self.decoding(w) * self.own_prefill_s(w) * self.strain(w) ** 3

    def handoff_s(self, w: Plain) -> float:
        missing = max(0, self.demand.num_prompt_blocks - w.in_pool)
        return self.prices.handoff_s + missing * self.prices.handoff_block_s

    def best_other(self, w: Plain) -> Plain | None:
        others = [other for other in self.workers if other.prefills and other is not w]
        return min(others, key=self.compute_s, default=None)

    def remote_s(self, w: Plain) -> float:
        best = self.best_other(w)
        return math.inf if best is None else self.compute_s(best) + self.handoff_s(w)

    def local_s(self, w: Plain) -> float:
        has_room = not self.demand.tpot_s or self.strain(w) < 1
        return self.compute_s(w) if w.computes or (w.is_short and has_room) else math.inf

    def ttft_s(self, w: Plain) -> float:
        best = self.best_other(w)
        if best is None or self.local_s(w) <= self.remote_s(w):
            return self.prefill_s(w)
        return self.prefill_s(best) + self.handoff_s(w)

    def tpot_s(self, w: Plain) -> float:
        own_context = self.demand.num_prompt_tokens + 0.5 * self.demand.num_output_tokens
        others = w.num_sequences
        step = w.unit[0] + (others + 1) * w.unit[1] + (others * self.context(w) + own_context) * w.unit[2]
        return step / (1 - self.lent(w)) + w.prefill_tokens * w.unit[3] / self.demand.num_output_tokens

    def answer_s(self, w: Plain) -> float:
        num_output = self.demand.num_output_tokens
        each = w.unit[1] + (self.demand.num_prompt_tokens + 0.5 * num_output) * w.unit[2]
        return num_output * self.tpot_s(w) + (num_output * w.num_sequences) * each

    def missing_s(self, w: Plain) -> float:
        return max(0, self.demand.num_blocks - w.in_pool - w.free_blocks) * MISSING_BLOCK_S

    def late_s(self, w: Plain) -> float:
        late, demand = 0.0, self.demand
        if demand.ttft_s:
            late += LATE * max(0.0, self.ttft_s(w) - demand.ttft_s)
        if demand.tpot_s:
            late += LATE * demand.num_output_tokens * max(0.0, self.tpot_s(w) - demand.tpot_s)
        return late

    def away_s(self, w: Plain) -> float:
        able = [other for other in self.workers if other.can_decode]
        if not self.demand.session or not able:
            return 0.0
        return 0.0 if w is max(able, key=lambda other: other.tie) else AWAY_FROM_HOME_S

    # ---- choices ----

    def route(self, name: str) -> Answer:
        costs: dict[str, tuple[Callable[[Plain], float], Callable[[Plain], float]]] = {
            "kv_aware": (self.whole_s, self.compute_s),
            "session_affinity": (lambda w: self.whole_s(w) + self.away_s(w), self.compute_s),
            "prefix_affinity": (self.uncached, self.uncached),
            "least_loaded": (lambda w: w.num_sequences, lambda w: w.prefill_tokens),
        }
        decode_cost, prefill_cost = costs[name]
        careful = name in ("kv_aware", "session_affinity")
        able = [w for w in self.workers if w.decodes]
        if careful:
            able = [w for w in able if self.local_s(w) < math.inf or self.best_other(w) is not None]
        may = self.not_avoided(able)
        if careful and self.demand.tpot_s:
            may = [w for w in may if self.tpot_s(w) <= self.demand.tpot_s] or may
        if not may:
            return None
        decode = min(may, key=lambda w: (decode_cost(w), w.tie))
        others = self.not_avoided([w for w in self.workers if w.prefills and w is not decode])
        others.sort(key=lambda w: (prefill_cost(w), w.tie))
        is_local = self.local_s(decode) <= self.remote_s(decode) if careful else decode.computes
        if not others or is_local:
            return decode.row, ()
        return decode.row, tuple(w.row for w in others[: self.num_prefill])

    def whole_s(self, w: Plain) -> float:
        return self.missing_s(w) + min(self.local_s(w), self.remote_s(w)) + self.answer_s(w) + self.late_s(w)

    def not_avoided(self, workers: list[Plain]) -> list[Plain]:
        return [w for w in workers if w.row != self.demand.avoid] or workers

    def in_turn(self, decode_turn: int, prefill_turn: int) -> Answer:
        decoders = self.not_avoided([w for w in self.workers if w.decodes])
        if not decoders:
            return None
        decode = decoders[decode_turn % len(decoders)]
        others = [w.row for w in self.workers if w.prefills and w is not decode]
        if decode.computes or not others:
            return decode.row, ()
        first = prefill_turn % len(others)
        return decode.row, tuple([*others[first:], *others[:first]][: self.num_prefill])

    def at_random(self, seed: int) -> Answer:
        return self.in_turn(drawn(seed, 0), drawn(seed, 1))
