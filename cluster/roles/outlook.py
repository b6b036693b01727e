"""Expects how many requests a second a split of workers would answer within their targets, from a forecast of the load and what workers' steps take.

A model of queues in steady state: prompts wait for whoever prefills (M/G/c, Allen-Cunneen's approximation of the mean wait with
Sakasegawa's exponent, exponential tails); sequences that decode are as many as Little's law says, which sets how long a step takes. It
ranks splits; it does not promise times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.roles.values import Forecast, RoleSplit

Floats = npt.NDArray[np.float64]

FULL = 0.97
"""A queue that is busier than this has no steady state."""
LOADS = np.array((0.97, 0.9, 0.8, 0.7, 0.55, 0.4))
PARTIAL = 0.1
"""Of an answer's worth counts for how near its worker comes to the target: where no split keeps it, the nearer one is better."""
REMEMBERED = 0.8
"""Sequences that decode now count so much where fewer are expected in the long run."""
MAX_LENT_SHARE = 0.3
"""Of a DECODE worker's time for prompts at most: routers send it what its answers do not notice. So much was seen with a short prefill side."""
MAX_MIXED_SHARE = 0.95
"""Of a MIXED worker's time for prompts at most."""
MARGINS = ((1.0, 0.7), (1.3, 0.3))
"""Loads in relation to the forecast, and what each counts: of splits that serve the forecast the one with more in hand is better."""
BLOCKS_USED = 0.95
LEAST_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Costs:
    """What work takes on an average worker, and what fits on it."""

    step_s: float
    decode_s: float
    context_s: float
    prompt_s: float
    look_s: float
    batch_tokens: int
    max_num_seqs: int
    kv_tokens: int
    """Of the pool."""
    handoff_s: float = 0.0
    local_tokens: int = 0
    """Prompts of at most so many uncached tokens may be computed by the DECODE worker itself."""


@dataclass(frozen=True, slots=True)
class RoleTargets:
    ttft_s: float
    tpot_s: float


def goodput(splits: list[RoleSplit], forecast: Forecast, costs: Costs, targets: RoleTargets) -> Floats:
    """Good requests a second of each split, [C]."""
    prefill, decode, mixed = (np.array(counts, np.float64) for counts in zip(*splits, strict=True))
    total = np.zeros(len(splits))
    for factor, weight in MARGINS:
        rate = forecast.asked_per_s + (factor - 1) * forecast.requests_per_s
        at_load = np.zeros(len(splits))
        for local_tokens in local_limits(forecast, costs):
            good = _goodput(prefill, decode, mixed, rate, forecast, costs, targets, local_tokens)
            at_load = np.maximum(at_load, good)
        total += weight / factor * at_load
    norm = sum(weight for _, weight in MARGINS)
    result: Floats = total / norm
    return result


def local_limits(forecast: Forecast, costs: Costs) -> list[int]:
    """Lengths up to which prompts may be computed where they decode: none, and some points of their distribution within what settings allow. A router
    finds by itself what workers can take beside their answers."""
    points = forecast.uncached[1::2]
    return [0, *sorted({math.ceil(point) for point in points if point <= costs.local_tokens})]


def _goodput(
    prefill: Floats,
    decode: Floats,
    mixed: Floats,
    rate: float,
    forecast: Forecast,
    costs: Costs,
    targets: RoleTargets,
    local_tokens: int,
) -> Floats:
    """At one load, with prompts of up to `local_tokens` computed where they decode."""
    seconds = _prompt_seconds(forecast, costs)
    is_local = np.array(forecast.uncached) <= local_tokens if local_tokens else np.zeros(len(seconds), np.bool_)
    local_work = rate * float(np.mean(np.where(is_local, seconds, 0.0)))
    work = rate * float(seconds.mean()) - local_work
    lent = np.minimum(MAX_LENT_SHARE, local_work / np.maximum(decode, 1e-9))
    """The part of a DECODE worker's time that local prompts take."""
    lent = np.where(decode > 0, lent, 0.0)
    to_prefill: Floats = work + np.where(decode > 0, 0.0, local_work)

    share = np.clip((to_prefill - 0.85 * prefill) / np.maximum(mixed, 1e-9), 0.0, MAX_MIXED_SHARE)
    """The part of a MIXED worker's time that prompts take."""
    share = np.where(mixed > 0, share, 0.0)
    busy = to_prefill / np.maximum(prefill + MAX_MIXED_SHARE * mixed, 1e-9)
    elsewhere = seconds if is_local.all() else seconds[~is_local]
    in_time = _prompts_in_time(busy, prefill + mixed, elsewhere, costs.handoff_s, targets.ttft_s)
    admitted = np.minimum(1.0, FULL / np.maximum(busy, 1e-9))
    if is_local.any():
        # Whoever decodes can be too busy for them, and they wait in one line with those that too few others compute.
        lending = local_work / np.maximum(MAX_LENT_SHARE * decode, 1e-9)
        beside = _prompts_in_time(lending, decode, seconds[is_local], 0.0, targets.ttft_s) * admitted
        part = np.where(decode > 0, float(is_local.mean()), 0.0)
        in_time = (1 - part) * in_time + part * beside
        admitted = (1 - part) * admitted + part * np.minimum(1.0, FULL / np.maximum(lending, 1e-9))
    pauses = _Pauses(lent, seconds[is_local] if is_local.any() else seconds), _Pauses(share, elsewhere)
    served = _decodes_in_time(
        decode * (1 - lent), mixed * (1 - share), pauses, rate * admitted, forecast, costs, targets
    )
    good: Floats = rate * in_time * served
    return np.where((prefill + mixed > 0) & (decode + mixed > 0), good, 0.0)


def _prompt_seconds(forecast: Forecast, costs: Costs) -> Floats:
    """What prompts take at the points of their distribution, [K]."""
    uncached = np.maximum(1.0, np.array(forecast.uncached))
    chunk = max(LEAST_CHUNK, costs.batch_tokens or 512)
    before = np.maximum(0.0, forecast.prompt_tokens - uncached.mean()) + 0.5 * uncached
    seconds: Floats = np.ceil(uncached / chunk) * costs.step_s + uncached * (costs.prompt_s + before * costs.look_s)
    return seconds


def _prompts_in_time(busy: Floats, servers: Floats, seconds: Floats, handoff_s: float, ttft_s: float) -> Floats:
    """The share of prompts whose first token comes in time, [C].

    A router lets those that can still be in time pass those that are late, so of too many prompts it serves as many in time as the
    best load would: `loads` are those that it may choose from.
    """
    loads = np.minimum(busy[:, None], LOADS[None, :])
    mean, spread = seconds.mean(), 0.5 * (1 + seconds.var() / seconds.mean() ** 2)
    count = np.maximum(servers, 1.0)[:, None]
    must_wait = loads ** (np.sqrt(2 * (count + 1)) - 1)
    tail_s = spread * mean / (count * (1 - loads))
    left_s = ttft_s - handoff_s - seconds
    """[K]: how long each may wait."""
    late = must_wait[:, :, None] * np.exp(-np.maximum(0.0, left_s)[None, None, :] / tail_s[:, :, None])
    in_time = np.where(left_s[None, None, :] > 0, 1 - late, 0.0).mean(axis=2)
    result: Floats = (in_time * loads / np.maximum(busy, 1e-9)[:, None]).max(axis=1)
    return result


@dataclass(frozen=True, slots=True)
class _Pauses:
    """What prompts take of the time of workers that decode as well."""

    share: Floats
    """Of a worker's time, [C]."""
    seconds: Floats
    """Of the prompts, [K]."""


def _decodes_in_time(
    alone: Floats,
    shared: Floats,
    pauses: tuple[_Pauses, _Pauses],
    rate: Floats,
    forecast: Forecast,
    costs: Costs,
    targets: RoleTargets,
) -> Floats:
    """The share of answers that are served, and in time, [C]. `alone` and `shared`: whole workers' worth of DECODE and of MIXED time, with the
    pauses of each."""
    units = np.maximum(alone + shared, 1e-9)
    length = forecast.prompt_tokens + 0.5 * forecast.output_tokens
    each_s = costs.decode_s + length * costs.context_s
    tokens_per_s = rate * max(1.0, forecast.output_tokens) / units
    room = max(1.0, min(costs.max_num_seqs or 256, BLOCKS_USED * costs.kv_tokens / max(1.0, length)))
    load = np.minimum(tokens_per_s * each_s, FULL)
    expected = tokens_per_s * costs.step_s / (1 - load)
    expected = np.clip(expected, 1.0, room)
    # Those that decode now have contexts of their own, whatever comes.
    left = np.clip(REMEMBERED * forecast.num_sequences / units - expected, 0.0, np.maximum(0.0, room - expected))
    running = expected + left
    most_per_s = room / (costs.step_s + room * each_s)
    served = np.minimum(1.0, most_per_s / np.maximum(tokens_per_s, 1e-9))
    tokens = max(2.0, forecast.output_tokens)
    step_s = costs.step_s + expected * each_s + left * (costs.decode_s + forecast.context_tokens * costs.context_s)
    spread_s = (step_s - costs.step_s) / np.sqrt(running)
    in_alone, in_shared = (_answers_in_time(step_s, spread_s, each, tokens, targets.tpot_s) for each in pauses)
    result: Floats = served * (alone * in_alone + shared * in_shared) / units
    return result


def _answers_in_time(step_s: Floats, spread_s: Floats, pauses: _Pauses, tokens: float, tpot_s: float) -> Floats:
    """The share of answers of so many tokens that end in time where steps take `step_s`, give or take `spread_s`, with pauses for prompts in between, [C].

    Prompts come at random: a short answer meets none, or one that it does not make good any more; a long one meets about as many as its share.
    So the time that they take of an answer is that of a Poisson number of prompts, and none, with its chance, is told apart from some.
    """
    span_s = tokens * tpot_s
    left_s, deviation_s = span_s - tokens * step_s, tokens * spread_s
    mean_s, square = float(pauses.seconds.mean()), float((pauses.seconds**2).mean())
    count = pauses.share * span_s / mean_s
    none = np.exp(-count)
    some = np.maximum(1 - none, 1e-9)
    pause_s = count * mean_s / some
    variance = np.maximum(0.0, (count * square + (count * mean_s) ** 2) / some - pause_s**2)
    undisturbed = _below(left_s, deviation_s)
    disturbed = _below(left_s - pause_s, np.sqrt(deviation_s**2 + variance))
    in_time = none * undisturbed + (1 - none) * disturbed
    near = np.clip(tpot_s / np.maximum(step_s + pauses.share * tpot_s, 1e-9), 0.0, 1.0)
    result: Floats = (1 - PARTIAL) * in_time + PARTIAL * near
    return result


def _below(most: Floats, deviation: Floats) -> Floats:
    """About the chance of a normal variable with mean 0 to stay below `most`."""
    result: Floats = 1 / (1 + np.exp(np.clip(-1.7 * most / np.maximum(deviation, 1e-9), -60, 60)))
    return result
