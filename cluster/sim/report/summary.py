"""The figures of one simulation: goodput, percentiles, shares, utilisation. Pure; every figure comes from the record alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.sim.record import RequestRecord, RunRecord, WorkerSample

PERCENTS = (50, 90, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class Spread:
    """Nearest-rank percentiles in seconds; None where no request had such a time."""

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p100: float | None

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread:
        ordered = sorted(value for value in values if value is not None)
        return Spread(*(percentile(ordered, percent) for percent in PERCENTS))


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """One worker over the run, or several of one role: means and the highest, of its samples."""

    name: str
    role: str
    """The one that it had longest."""
    num_workers: int
    busy: float
    """Share of the time in which a step ran."""
    kv_used: float
    kv_peak: float
    mean_running: float
    mean_waiting: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Times in seconds, rates per second of virtual time, shares from 0 to 1."""

    num_requests: int
    num_ok: int
    outcomes: dict[str, int]
    num_good: int
    """Ended well and within their targets."""
    duration_s: float
    goodput_per_s: float
    """Good requests a second."""
    good_share: float
    """Of all requests, refused ones included."""
    requests_per_s: float
    """Ended well."""
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft: Spread
    tpot: Spread
    e2e: Spread
    max_gap: Spread
    queue_share: float
    """Of all requests' time from arrival to end, spent without blocks."""
    queue_share_of_ttft: float
    transfer_share: float
    """Of the same time, spent between the computed prompt and its last KV byte in place."""
    transfer_share_of_ttft: float
    cached_share: float
    """Prompt tokens that a prefix cache had, of requests that ended well."""
    workers: tuple[WorkerUse, ...]
    roles: tuple[WorkerUse, ...]
    """The same, over all samples of each role."""
    num_switches: int
    switches_by_worker: dict[str, int]
    num_faults: int
    targets: tuple[tuple[float | None, float | None], ...]
    """Pairs of TTFT and TPOT that requests had to meet, the most frequent first; at most 8."""
    num_events: int
    num_steps: int
    wall_s: float
    events_per_s: float
    peak_rss_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(record: RunRecord) -> Summary:
    """Figures of a whole run; an empty one gives zeros."""
    requests = record.requests
    ok = [request for request in requests if request.outcome == "ok"]
    good = sum(request.is_good for request in requests)
    span = record.duration_s
    lived = sum(request.e2e_s or 0.0 for request in ok)
    waited = sum(request.ttft_s or 0.0 for request in ok)
    queued = sum(request.queue_s for request in ok)
    moved = sum(request.transfer_s for request in ok)
    switched = Counter(switch.worker for switch in record.switches)
    targets = Counter((request.ttft_target_s, request.tpot_target_s) for request in requests)
    return Summary(
        num_requests=len(requests),
        num_ok=len(ok),
        outcomes=dict(Counter(request.outcome for request in requests).most_common()),
        num_good=good,
        duration_s=span,
        goodput_per_s=_ratio(good, span),
        good_share=_ratio(good, len(requests)),
        requests_per_s=_ratio(len(ok), span),
        input_tokens_per_s=_ratio(sum(request.prompt_tokens for request in ok), span),
        output_tokens_per_s=_ratio(sum(request.output_tokens for request in requests), span),
        ttft=Spread.of(request.ttft_s for request in ok),
        tpot=Spread.of(request.tpot_s for request in ok),
        e2e=Spread.of(request.e2e_s for request in ok),
        max_gap=Spread.of(request.max_gap_s for request in ok if request.output_tokens > 1),
        queue_share=_ratio(queued, lived),
        queue_share_of_ttft=min(1.0, _ratio(queued, waited)),
        transfer_share=_ratio(moved, lived),
        transfer_share_of_ttft=min(1.0, _ratio(moved, waited)),
        cached_share=_ratio(sum(request.cached_tokens for request in ok), sum(request.prompt_tokens for request in ok)),
        workers=_by_worker(record.samples),
        roles=_by_role(record.samples),
        num_switches=len(record.switches),
        switches_by_worker=dict(switched.most_common()),
        num_faults=len(record.faults),
        targets=tuple(pair for pair, _ in targets.most_common(8)),
        num_events=record.num_events,
        num_steps=record.num_steps,
        wall_s=record.wall_s,
        events_per_s=_ratio(record.num_events, record.wall_s),
        peak_rss_bytes=record.peak_rss_bytes,
    )


def good_share(requests: Sequence[RequestRecord]) -> float:
    """Of all requests, those that ended well and within their targets."""
    return _ratio(sum(request.is_good for request in requests), len(requests))


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Nearest rank; `ordered` rises. None for no values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]


def _by_worker(samples: Sequence[WorkerSample]) -> tuple[WorkerUse, ...]:
    found: defaultdict[str, list[WorkerSample]] = defaultdict(list)
    for sample in samples:
        found[sample.worker].append(sample)
    return tuple(_use(name, found[name], 1) for name in sorted(found, key=natural))


def _by_role(samples: Sequence[WorkerSample]) -> tuple[WorkerUse, ...]:
    found: defaultdict[str, list[WorkerSample]] = defaultdict(list)
    for sample in samples:
        found[sample.role].append(sample)
    return tuple(_use(role, found[role], len({s.worker for s in found[role]})) for role in sorted(found))


def _use(name: str, samples: list[WorkerSample], num_workers: int) -> WorkerUse:
    count = len(samples)
    return WorkerUse(
        name=name,
        role=Counter(sample.role for sample in samples).most_common(1)[0][0],
        num_workers=num_workers,
        busy=sum(sample.busy for sample in samples) / count,
        kv_used=sum(sample.kv_used for sample in samples) / count,
        kv_peak=max(sample.kv_used for sample in samples),
        mean_running=sum(sample.running for sample in samples) / count,
        mean_waiting=sum(sample.waiting for sample in samples) / count,
    )


def natural(name: str) -> tuple[str, int]:
    """worker-2 before worker-10."""
    head, _, number = name.rpartition("-")
    return (head, int(number)) if number.isdecimal() else (name, -1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
