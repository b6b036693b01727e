"""Foretells the next minute's load from what routers have measured, and sums workers up to the average one. Knows no splits."""

from __future__ import annotations

import numpy as np

from cluster.roles.outlook import Costs, RoleTargets
from cluster.roles.values import Forecast, Observation
from router.requests.demand import NUM_POINTS, DemandReport

TREND = 0.5
"""So much of the rise of the last 15 s over the last minute is expected to go on."""


def foretell(observation: Observation, targets: RoleTargets) -> Forecast:
    """The load of all routers together."""
    demands = observation.demands
    rates = [_rate(demand) for demand in demands]
    total = sum(rates)
    prompts = _mixed([demand.prompt_tokens for demand in demands], rates)
    share = _mean([demand.uncached_share for demand in demands], rates, 1.0)
    waiting = sum(demand.waiting_tokens for demand in demands)
    there = sum(worker.waiting_prefill_tokens for worker in observation.workers if worker.is_up)
    decoding = [worker for worker in observation.workers if worker.is_up and worker.num_decoding]
    num_decoding = sum(worker.num_decoding for worker in decoding)
    held = sum((worker.num_blocks - worker.num_free_blocks) * worker.block_size for worker in decoding)
    return Forecast(
        requests_per_s=total,
        prompt_tokens=sum(prompts) / max(1, len(prompts)),
        uncached=tuple(max(1.0, share * tokens) for tokens in prompts) or (1.0,),
        output_tokens=_mean([demand.output_tokens for demand in demands], rates, 0.0),
        backlog_tokens=waiting + there,
        num_sequences=num_decoding,
        context_tokens=held / max(1, num_decoding),
        ttft_attainment=_attained([demand.ttft_s for demand in demands], rates, targets.ttft_s),
        tpot_attainment=_attained([demand.tpot_s for demand in demands], rates, targets.tpot_s),
    )


def _rate(demand: DemandReport) -> float:
    """Requests a second that are expected: what came lately, a burst in part at once, and on with the trend."""
    burst, lately, before = demand.arrivals_per_s
    return max(lately, 0.5 * (burst + lately)) + TREND * max(0.0, lately - before)


def _mean(values: list[float], weights: list[float], default: float) -> float:
    total = sum(weights)
    if not total:
        return max(values, default=default)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total


def _mixed(points: list[tuple[float, ...]], weights: list[float]) -> tuple[float, ...]:
    """NUM_POINTS points of the distributions together."""
    values: list[tuple[float, float]] = []
    for own, weight in zip(points, weights, strict=True):
        values += [(value, max(weight, 1e-9)) for value in own]
    if not values:
        return ()
    values.sort()
    ends = np.cumsum([weight for _, weight in values])
    places = np.searchsorted(ends, (np.arange(NUM_POINTS) + 0.5) / NUM_POINTS * ends[-1])
    return tuple(values[min(int(place), len(values) - 1)][0] for place in places)


def _attained(points: list[tuple[float, ...]], weights: list[float], target_s: float) -> float:
    """The share of measured times within the target; 1 where nothing was measured."""
    shares = [
        (sum(value <= target_s for value in own) / len(own), weight)
        for own, weight in zip(points, weights, strict=True)
        if own
    ]
    return _mean([share for share, _ in shares], [weight for _, weight in shares], 1.0) if shares else 1.0


def average(observation: Observation, local_tokens: int) -> Costs | None:
    """The average of the workers that take work and whose steps have been measured. None: there is none."""
    known = [worker for worker in observation.workers if worker.takes_work and worker.is_known]
    if not known:
        return None
    # A worker that is twice as slow does half as much: what adds up is work a second.
    each = 1 / np.mean([1 / np.maximum(worker.seconds, 1e-12) for worker in known], axis=0)
    step_s, decode_s, context_s, prompt_s, look_s = map(float, each)
    return Costs(
        step_s,
        decode_s,
        context_s,
        prompt_s,
        look_s,
        batch_tokens=round(float(np.mean([worker.batch_tokens for worker in known]))),
        max_num_seqs=round(float(np.mean([worker.max_num_seqs for worker in known]))),
        kv_tokens=round(float(np.mean([worker.num_blocks * worker.block_size for worker in known]))),
        handoff_s=observation.handoff_s,
        local_tokens=local_tokens,
    )
