"""What a router says of itself and of its workers, as Prometheus reads it at one moment beside what the API has counted."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.api.vllm_metrics import vllm_metrics
from router.backend import RouterStatus
from router.roles import RolesReport


class Snapshot:
    """What an encoder reads: the API's own numbers, and those of the router at one moment; nothing is kept twice."""

    def __init__(
        self, registry: CollectorRegistry, status: RouterStatus, roles: RolesReport, vllm_model: str = ""
    ) -> None:
        """`vllm_model`: the model whose numbers have vLLM's names besides; empty: none has."""
        self._vllm_model = vllm_model
        self._registry = registry
        self._status = status
        self._roles = roles

    def collect(self) -> Iterator[Metric]:
        own = list(self._registry.collect())
        yield from own
        status = self._status
        if self._vllm_model:
            yield from vllm_metrics(own, status, self._vllm_model)
        waiting = GaugeMetricFamily("baton_num_requests_waiting", "Requests that wait for a worker")
        waiting.add_metric((), status.num_waiting)
        yield waiting
        for name, value in status.counters:
            total = CounterMetricFamily(f"baton_router_{_metric_name(name)}", f"Router total of {name}")
            total.add_metric((), value)
            yield total
        info = GaugeMetricFamily("baton_worker_up", "1: connected", labels=("worker_id", "role"))
        gauges = {
            name: GaugeMetricFamily(f"baton_worker_{name}", f"Worker's {name}", labels=("worker_id",))
            for name in ("num_running", "num_waiting", "num_transferring", "num_free_blocks", "num_blocks")
        }
        totals: dict[str, CounterMetricFamily] = {}
        for view in status.workers:
            worker_id = view.status.worker_id
            info.add_metric((worker_id, view.status.role.value), float(view.connected))
            for name, gauge in gauges.items():
                gauge.add_metric((worker_id,), getattr(view.status.load, name))
            for name, value in view.status.counters:
                family = totals.setdefault(
                    name,
                    CounterMetricFamily(
                        f"baton_worker_{_metric_name(name)}", f"Worker's total of {name}", labels=("worker_id",)
                    ),
                )
                family.add_metric((worker_id,), value)
        yield info
        yield from gauges.values()
        yield from _forecast_metrics(status)
        yield from _role_metrics(self._roles)
        yield from totals.values()


def _forecast_metrics(status: RouterStatus) -> Iterator[Metric]:
    """What the router has learnt of times; labels are workers, at most eight kinds of them, and fixed words."""
    forecast = status.forecast
    speeds = GaugeMetricFamily(
        "baton_worker_speed_ratio",
        "Step times in relation to the worker's kind; above 1: slower",
        labels=("worker_id",),
    )
    for view in status.workers:
        speeds.add_metric((view.status.worker_id,), view.speed)
    yield speeds
    learnt = GaugeMetricFamily("baton_forecast_seconds", "Learnt seconds of a unit of work", labels=("kind", "work"))
    for index, kind in enumerate(forecast.kinds):
        for work, seconds in kind.seconds:
            learnt.add_metric((f"{index}:{kind.name}", work), seconds)
    learnt.add_metric(("all", "handoff"), forecast.handoff_s)
    learnt.add_metric(("all", "handoff_block"), forecast.handoff_block_s)
    yield learnt
    ratios = GaugeMetricFamily(
        "baton_ttft_forecast_ratio", "Measured times to first tokens over foretold ones", labels=("quantile",)
    )
    for quantile, ratio in zip(("0.1", "0.5", "0.9"), forecast.ttft_ratios, strict=True):
        ratios.add_metric((quantile,), ratio)
    yield ratios


def _role_metrics(roles: RolesReport) -> Iterator[Metric]:
    """Of the role controller in this router's process; only the one that leads knows how many workers are wanted."""
    yield GaugeMetricFamily("baton_roles_leader", "1: this router's role controller acts", float(roles.leads))
    switches = CounterMetricFamily(
        "baton_role_switches", "Switches that have ended", labels=("from", "to", "reason", "outcome")
    )
    for count in roles.counts:
        switches.add_metric((count.source, count.target, count.reason, count.outcome), count.count)
    yield switches
    phases = GaugeMetricFamily(
        "baton_role_switch_phase_seconds", "Duration of a phase of switches", labels=("phase", "quantile")
    )
    for phase, median, most in roles.phase_s:
        phases.add_metric((phase, "0.5"), median)
        phases.add_metric((phase, "0.99"), most)
    yield phases
    if not roles.leads:
        return
    yield GaugeMetricFamily(
        "baton_desired_workers", "Workers that the load needs to meet its targets; 0: not known", roles.desired_workers
    )
    gains = GaugeMetricFamily(
        "baton_role_gain_requests_per_second", "Of the last change of roles: good requests a second", labels=("kind",)
    )
    gains.add_metric(("predicted",), roles.predicted_gain)
    gains.add_metric(("measured",), roles.measured_gain)
    yield gains


def _metric_name(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", name).removesuffix("_total")
