"""Writes the chart's Grafana dashboards from panels.yaml: `python deploy/helm/dashboards.py`. A test compares them with the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "baton" / "dashboards"
DASHBOARDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("panels.yaml").read_text())
WIDTH, HEIGHT = 12, 8
"""Of a panel, of 24 columns."""


def dashboard(name: str) -> dict[str, Any]:
    table = DASHBOARDS[name]
    return {
        "uid": f"baton-{name}",
        "title": table["title"],
        "tags": ["baton"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "source",
                    "type": "datasource",
                    "query": "prometheus",
                    "label": "Prometheus",
                }
            ]
        },
        "links": [
            {
                "type": "dashboards",
                "tags": ["baton"],
                "title": "Baton",
                "asDropdown": True,
            }
        ],
        "panels": [_panel(at, panel) for at, panel in enumerate(table["panels"])],
    }


def _panel(at: int, panel: dict[str, Any]) -> dict[str, Any]:
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 30} if panel.get("stacked") else {}
    source = {"type": "prometheus", "uid": "${source}"}
    kind = panel.get("kind", "timeseries")
    return {
        "id": at + 1,
        "type": kind,
        "title": panel["title"],
        "description": panel.get("help", ""),
        "datasource": source,
        "gridPos": {
            "x": at % 2 * WIDTH,
            "y": at // 2 * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {
            "defaults": {"unit": panel["unit"], "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {
            "legend": {
                "displayMode": "table",
                "placement": "right",
                "calcs": ["lastNotNull"],
            }
        }
        if kind == "timeseries"
        else {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "expr": query,
                "legendFormat": legend,
                "datasource": source,
            }
            for number, (legend, query) in enumerate(panel["lines"].items())
        ],
    }


def text_of(name: str) -> str:
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(text_of(each))
