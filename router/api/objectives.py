"""How far the objectives are met, as the chart's alerts define them: counts since this router's start, from which a page makes windows.

Answers are those of endpoints under /v1 alone; the alerts count all requests.
"""

from __future__ import annotations

from prometheus_client.registry import Collector

FIRST_TOKEN_S = 2.5
"""An upper end of a bucket of `baton_time_to_first_token_seconds`."""
FIRST_TOKENS_IN_TIME = 0.99
ANSWERS_WITHOUT_FAULT = 0.999
"""Answers of /v1 that are no 5xx."""


def attainment(ttft: Collector, requests: Collector) -> dict[str, float]:
    """First tokens, and those in time; answers, and those without a fault of ours."""
    counts = {"first_tokens": 0.0, "in_time": 0.0, "answers": 0.0, "without_fault": 0.0}
    for metric in ttft.collect():
        for sample in metric.samples:
            if sample.name.endswith("_count"):
                counts["first_tokens"] += sample.value
            elif sample.labels.get("le") == str(FIRST_TOKEN_S):
                counts["in_time"] += sample.value
    for metric in requests.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total") and sample.labels["endpoint"].startswith("/v1/"):
                counts["answers"] += sample.value
                counts["without_fault"] += sample.value * (not sample.labels["status"].startswith("5"))
    return counts
