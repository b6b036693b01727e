"""The PromQL that the chart ships: rules of its alerts, and lines of its dashboards' panels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml
from chart_render import CHART

ELSEWHERE = ("gpus",)
"""Dashboards over metrics that are not Baton's."""


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels(interval: str = "1m") -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel and PromQL of each line, with Grafana's variable filled in."""
    for path in sorted((CHART / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield path.stem, panel["title"], target["expr"].replace("$__rate_interval", interval)
