"""Writes the chart's README.md from the comments in its values.yaml: `python -m tests.kube.chart_readme`. A test compares them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "baton"
HEAD = """# The Baton chart

    helm install baton deploy/helm/baton

on Kubernetes 1.29 or later, without an operator, a CRD or another chart. The defaults are a try-out on CPUs: the model in the image, one prefill and one decode
worker, one router, Ray's head and a Redis. [docs/kubernetes.md](../../../docs/kubernetes.md) says how it works, how to size it and what was not verified; `ci/` has values for larger
clusters. What does not fit is refused by `values.schema.json`, or with a sentence.

`poolDefaults` holds for every pool; `pools.NAME` lays over it. This table is made from values.yaml.

| value | default | meaning |
|---|---|---|
"""
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][\w.-]*):")


def table() -> list[tuple[str, Any, str]]:
    """Path, default and meaning of every value that has a meaning to tell, or no values below it."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    rows: list[tuple[str, Any, str]] = []
    path: list[str] = []
    told = ""
    for line in (CHART / "values.yaml").read_text().splitlines():
        if line.strip().startswith("# --"):
            told = line.strip().removeprefix("# --").strip()
            continue
        found = _KEY.match(line)
        if not found:
            continue
        path = [*path[: len(found["indent"]) // 2], found["key"]]
        value = values
        for name in path:
            value = value[name]
        if told or not isinstance(value, dict) or not value:
            rows.append((".".join(path), value, told))
        told = ""
    return rows


def text() -> str:
    rows = [f"| `{path}` | {_shown(value)} | {meaning} |" for path, value, meaning in table()]
    return HEAD + "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "see values.yaml" if len(json.dumps(value)) > 80 else f"`{json.dumps(value)}`"
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    (CHART / "README.md").write_text(text())
