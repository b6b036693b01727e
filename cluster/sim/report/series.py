"""A record on a time axis: what arrives, waits, runs and keeps its targets in each of at most 240 intervals. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from cluster.sim.record import RunRecord
from cluster.sim.report.summary import good_share, natural, percentile

MAX_BINS = 240
MAX_BANDS = 64
"""Rows of workers; with more workers, neighbours by name share a row."""
ROLES = ("prefill", "decode", "mixed")

Values = tuple[float | None, ...]
"""One an interval; None: nothing to say."""


@dataclass(frozen=True, slots=True)
class Band:
    """A worker, or several neighbours, on the time axis."""

    name: str
    num_workers: int
    roles: tuple[str, ...]
    """In each interval the one that most of them have; empty: none was there."""
    busy: Values


@dataclass(frozen=True, slots=True)
class Series:
    """`edge_s[i]` to `edge_s[i + 1]` is interval i."""

    edge_s: tuple[float, ...]
    arrivals_per_s: Values
    ended_per_s: Values
    output_tokens_per_s: Values
    waiting: Values
    """In routers' queues and at workers, the most in the interval."""
    running: Values
    attainment: Values
    """Good ones among requests that arrived in the interval."""
    ttft_p50_s: Values
    ttft_p90_s: Values
    """Of requests that arrived in the interval."""
    tpot_p50_s: Values
    tpot_p90_s: Values
    role_counts: dict[str, Values]
    """Workers in each role."""
    role_busy: dict[str, Values]
    kv_used: Values
    bands: tuple[Band, ...]
    switches: tuple[float, ...]
    faults: tuple[tuple[float, str], ...]

    @property
    def num_bins(self) -> int:
        return len(self.edge_s) - 1


def make_series(record: RunRecord) -> Series:
    """Intervals are at least as long as the record's samples are apart."""
    duration = max(record.duration_s, 1e-9)
    num_bins = max(1, min(MAX_BINS, int(duration / max(record.sample_interval_s, 1e-9))))
    width = duration / num_bins

    def place(at_s: float) -> int:
        return min(num_bins - 1, max(0, int(at_s / width)))

    arrived: list[list[int]] = [[] for _ in range(num_bins)]
    ended, tokens = [0] * num_bins, [0.0] * num_bins
    for index, request in enumerate(record.requests):
        arrived[place(request.arrival_s)].append(index)
        if request.finished_s is not None:
            ended[place(request.finished_s)] += 1
            _spread_tokens(tokens, request.first_token_s, request.finished_s, request.output_tokens, width)

    def quantiles(attribute: str, percent: int) -> Values:
        values = []
        for indices in arrived:
            found = (getattr(record.requests[index], attribute) for index in indices)
            values.append(percentile(sorted(value for value in found if value is not None), percent))
        return tuple(values)

    samples = _Samples(record, num_bins, place)
    return Series(
        edge_s=tuple(index * width for index in range(num_bins + 1)),
        arrivals_per_s=tuple(len(indices) / width for indices in arrived),
        ended_per_s=tuple(count / width for count in ended),
        output_tokens_per_s=tuple(count / width for count in tokens),
        waiting=samples.waiting,
        running=samples.running,
        attainment=tuple(
            good_share([record.requests[index] for index in indices]) if indices else None for indices in arrived
        ),
        ttft_p50_s=quantiles("ttft_s", 50),
        ttft_p90_s=quantiles("ttft_s", 90),
        tpot_p50_s=quantiles("tpot_s", 50),
        tpot_p90_s=quantiles("tpot_s", 90),
        role_counts=samples.role_counts,
        role_busy=samples.role_busy,
        kv_used=samples.kv_used,
        bands=samples.bands,
        switches=tuple(switch.at_s for switch in record.switches),
        faults=tuple((fault.at_s, f"{fault.kind} {fault.target}".strip()) for fault in record.faults),
    )


def _spread_tokens(tokens: list[float], first_s: float | None, last_s: float, count: int, width: float) -> None:
    """Adds a request's tokens evenly over the time in which it had them."""
    if not count:
        return
    start = last_s if first_s is None else first_s
    first, last = (min(len(tokens) - 1, max(0, int(at_s / width))) for at_s in (start, last_s))
    if first == last:
        tokens[first] += count
        return
    rate = count / (last_s - start)
    for index in range(first, last + 1):
        tokens[index] += rate * max(0.0, min(last_s, (index + 1) * width) - max(start, index * width))


class _Samples:
    """What the record's samples say of each interval; an interval without samples has what the one before had."""

    def __init__(self, record: RunRecord, num_bins: int, place: Callable[[float], int]) -> None:
        sums: dict[str, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0] for _ in range(num_bins)])
        roles: dict[str, list[Counter[str]]] = defaultdict(lambda: [Counter() for _ in range(num_bins)])
        role_busy: dict[str, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0] for _ in range(num_bins)])
        kv = [[0.0, 0.0] for _ in range(num_bins)]
        moments: list[dict[float, list[float]]] = [{} for _ in range(num_bins)]
        for sample in record.samples:
            index = place(sample.at_s)
            roles[sample.worker][index][sample.role] += 1
            for total in (sums[sample.worker][index], role_busy[sample.role][index]):
                total[0] += sample.busy
                total[1] += 1
            kv[index][0] += sample.kv_used
            kv[index][1] += 1
            moment = moments[index].setdefault(sample.at_s, [0.0, 0.0])
            moment[0] += sample.waiting
            moment[1] += sample.running
        for routed in record.router_samples:
            moments[place(routed.at_s)].setdefault(routed.at_s, [0.0, 0.0])[0] += routed.waiting

        self.waiting = _carried([max((m[0] for m in found.values()), default=None) for found in moments])
        self.running = _carried([max((m[1] for m in found.values()), default=None) for found in moments])
        self.kv_used = _carried([_mean(total) for total in kv])
        names = sorted(roles, key=natural)
        is_sampled = [bool(found) for found in moments]
        owned = {name: _carried_roles(roles[name], is_sampled) for name in names}
        self.role_counts: dict[str, Values] = {
            role: tuple(float(sum(owned[name][index] == role for name in names)) for index in range(num_bins))
            for role in ROLES
        }
        self.role_busy: dict[str, Values] = {
            role: _carried([_mean(total) for total in role_busy[role]]) for role in ROLES if role in role_busy
        }
        busy = {name: _carried([_mean(total) for total in sums[name]]) for name in names}
        self.bands = _bands(names, owned, busy, num_bins)


def _bands(
    names: list[str], roles: dict[str, tuple[str, ...]], busy: dict[str, Values], num_bins: int
) -> tuple[Band, ...]:
    per_band = max(1, -(-len(names) // MAX_BANDS))
    bands = []
    for first in range(0, len(names), per_band):
        group = names[first : first + per_band]
        title = group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}"
        most, mean = [], []
        for index in range(num_bins):
            seen = Counter(roles[name][index] for name in group if roles[name][index])
            most.append(seen.most_common(1)[0][0] if seen else "")
            found = [value for name in group if roles[name][index] and (value := busy[name][index]) is not None]
            mean.append(sum(found) / len(found) if found else None)
        bands.append(Band(title, len(group), tuple(most), tuple(mean)))
    return tuple(bands)


def _carried_roles(counts: list[Counter[str]], is_sampled: list[bool]) -> tuple[str, ...]:
    """The most frequent role of each interval; where nobody was sampled, the one before."""
    result: list[str] = []
    for count, sampled in zip(counts, is_sampled, strict=True):
        if count:
            result.append(count.most_common(1)[0][0])
        else:
            result.append("" if sampled or not result else result[-1])
    return tuple(result)


def _carried(values: list[float | None]) -> Values:
    result: list[float | None] = []
    for value in values:
        result.append(value if value is not None or not result else result[-1])
    return tuple(result)


def _mean(total: list[float]) -> float | None:
    return total[0] / total[1] if total[1] else None
