"""What can be promised to a request that comes now: the wait in the router's queue, then the best that any worker would give."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from router.policies.outlook import Outlook


@dataclass(frozen=True, slots=True)
class Promise:
    """Seconds. `queue_s` is part of `ttft_s`; the rest of it is the line at the prefill worker, the prompt, and the handoff."""

    ttft_s: float
    tpot_s: float
    queue_s: float = 0.0

    def miss(self, ttft_s: float, tpot_s: float) -> str:
        """Why these targets are out of reach (0: none), in words for the client; empty: they are not."""
        if ttft_s and self.ttft_s > ttft_s:
            return f"the first token would come after {self.ttft_s:.2f} s, later than ttft = {ttft_s:g} s"
        if tpot_s and self.tpot_s > tpot_s:
            return f"a token would take {self.tpot_s * 1e3:.1f} ms, more than tpot = {tpot_s:g} s"
        return ""


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """What waits in the router's queue: requests, the prompt tokens that have to be computed for them, and how often a slot comes free."""

    num_requests: int = 0
    prompt_tokens: float = 0.0
    finished_per_s: float = 0.0


def promise(outlook: Outlook, line: WaitingLine, ttft_scale: float = 1.0) -> Promise | None:
    """For one request behind `line`. None: nothing has been measured, or nobody decodes.

    `ttft_scale`: measured first tokens over foretold ones. Of the workers that would keep the request's tpot the one with the
    soonest first token counts.
    """
    table, demand = outlook.table, outlook.demand
    soonest_s = outlook.ttft_s
    able = table.can_decode & table.is_known & (soonest_s < inf)
    if not able.any():
        return None
    in_time = able & (outlook.tpot_s <= demand.tpot_s) if demand.tpot_s else able
    may = in_time if in_time.any() else able
    ttft_s = np.where(may, soonest_s, inf)
    row = int(ttft_s.argmin())
    queue_s = _queue_s(outlook, line)
    return Promise(queue_s + float(ttft_s[row]) * ttft_scale, float(outlook.tpot_s[row]), queue_s)


def _queue_s(outlook: Outlook, line: WaitingLine) -> float:
    """Until those before it have gone to workers: as fast as prompts are computed, and as slots come free."""
    if not line.num_requests:
        return 0.0
    table = outlook.table
    computes = table.can_prefill if table.num_prefilling else table.can_decode
    unit = table.seconds[computes, 3] + table.looked_back[computes] * table.seconds[computes, 4]
    each = unit + outlook.decode_step_s[computes] / outlook.chunk[computes]
    tokens_per_s = float((1 / np.maximum(each, 1e-9)).sum())
    prompts_s = line.prompt_tokens / tokens_per_s if tokens_per_s else inf
    has_slots = bool((table.can_decode & (table.takes_blocks >= outlook.demand.num_prompt_blocks)).any())
    slots_s = line.num_requests / line.finished_per_s if line.finished_per_s and not has_slots else 0.0
    return max(prompts_s, slots_s)
