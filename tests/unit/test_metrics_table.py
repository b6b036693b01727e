"""docs/observability.md's tables of metrics, compared with what a router says and what routers and workers count."""

from __future__ import annotations

import re
from pathlib import Path

from fake_backend import FakeBackend
from prometheus_client.core import Metric

from router.api.metrics import Metrics
from router.api.status_metrics import Snapshot
from router.api.tenant_metrics import TenantMetrics
from workers.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
COUNTED = re.compile(r"baton_(router|worker)_(\w+)_total")
"""Families that have a metric for each name that is counted."""


def documented() -> dict[str, tuple[str, set[str]]]:
    """Type and labels by name."""
    rows = re.findall(
        r"^\| `(baton_\w+)` \| (\w+) \| [^|]*\| ([^|]*)\|", (ROOT / "docs/observability.md").read_text(), re.M
    )
    return {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in rows}


def shown_name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def test_the_table_is_what_a_router_says() -> None:
    backend = FakeBackend(Tokenizer.load(ROOT / "models" / "ernie-4.5-tiny"))
    metrics = Metrics(backend)
    TenantMetrics(metrics.registry, 1, lambda: False)
    said = {
        shown_name(metric): metric
        for metric in Snapshot(metrics.registry, backend.status(), backend.role_report()).collect()
    }
    fixed = {name: metric for name, metric in said.items() if not COUNTED.fullmatch(name)}
    table = documented()
    assert {name for name in table if not COUNTED.fullmatch(name)} == set(fixed)
    for name, metric in fixed.items():
        kind, labels = table[name]
        assert kind == metric.type, name
        used = {label for sample in metric.samples for label in sample.labels} - {"le"}
        assert used <= labels, name


def test_counters_that_are_documented_are_counted() -> None:
    sources = {room: "\n".join(p.read_text() for p in (ROOT / room).rglob("*.py")) for room in ("router", "workers")}
    rooms = {"router": sources["router"], "worker": sources["workers"]}
    found = 0
    for name in documented():
        if match := COUNTED.fullmatch(name):
            room, counted = match.groups()
            stems = {counted, re.sub(r"^workers_lost_\w+$", "workers_lost_{", counted)}
            stems.add(re.sub(r"^kv_(host|disk)_corrupt_blocks$", "_corrupt_blocks", counted))
            assert any(stem in rooms[room] for stem in stems), name
            found += 1
    assert found >= 7
