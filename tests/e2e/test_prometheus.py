"""The chart's dashboards and alerts, evaluated by a Prometheus that scrapes a running cluster under load."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_queries import ELSEWHERE, panels
from chart_render import CHART
from cluster_process import MODEL, ClusterProcess, free_port, wait_until
from conftest import RAY_METRICS_PORT
from kube_tools import NotToBeHad, prometheus

SCRAPE_S = 1
TRACE = "0af7651916cd43dd8448eb211c80319c"
INTERVAL = "10s"
"""What Grafana's $__rate_interval would be: four scrapes and more."""


class Prometheus:
    """A server of its own with the chart's rules, and a router and Ray's metrics to scrape."""

    def __init__(self, program: Path, folder: Path, router: str, ray: str) -> None:
        self._url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [str(CHART / "alerts.yaml")],
            "scrape_configs": [{"job_name": "baton", "static_configs": [{"targets": [router, ray]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._process = subprocess.Popen(
            [
                str(program),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={self._url.removeprefix('http://')}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def query(self, promql: str) -> list[float]:
        """The values now; NaN is none."""
        found = self._get("query?" + urllib.parse.urlencode({"query": promql}))["result"]
        values = [float(each["value"][1]) for each in found]
        return [value for value in values if not math.isnan(value)]

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=30):
                pass
        except OSError:  # not listening yet, or 503 while it reads its files
            return False
        return bool(self.query("baton_num_requests_waiting"))

    def traces(self, metric: str) -> set[str]:
        """Ids of traces that are kept beside the buckets of a histogram."""
        ends = {"start": "0", "end": str(2**31)}
        found = self._get("query_exemplars?" + urllib.parse.urlencode({"query": f"{metric}_bucket", **ends}))
        return {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}

    def alerts(self) -> set[str]:
        return {each["labels"]["alertname"] for each in self._get("alerts")["alerts"]}

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from error


@pytest.fixture
def server(cluster: ClusterProcess, tmp_path: Path) -> Iterator[Prometheus]:
    try:
        program = prometheus()
    except NotToBeHad as error:
        pytest.skip(str(error))
    started = Prometheus(program, tmp_path, cluster.url.removeprefix("http://"), f"127.0.0.1:{RAY_METRICS_PORT}")
    yield started
    started.stop()


def test_every_panel_has_data_buckets_lead_to_traces_and_no_alert_fires_on_a_running_cluster(
    cluster: ClusterProcess, server: Prometheus
) -> None:
    wait_until(server.is_ready, "Prometheus has scraped the router")
    ending = threading.Event()

    def ask() -> None:
        for number in itertools.count():
            if ending.is_set():
                return
            # Prompts that begin alike are found in the caches of decode workers, and none is handed over.
            body = {
                "model": MODEL.name,
                "prompt": f"{number} pages and windows, a story " * 8,
                "max_tokens": 24,
                "ignore_eos": True,
            }
            cluster.post("/v1/completions", body, {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        shown = [(board, panel, query) for board, panel, query in panels(INTERVAL) if board not in ELSEWHERE]
        assert len(shown) > 40
        for board, panel, query in shown:
            # Rates and quantiles want a few scrapes with requests between them.
            wait_until(lambda asked=query: bool(server.query(asked)), f"{board}: {panel} has data: {query}")  # type: ignore[misc]
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
            wait_until(
                lambda metric=f"baton_{name}_seconds": server.traces(metric) == {TRACE},  # type: ignore[misc]
                f"a slow {name} leads to a trace",
            )
        alerts = server.alerts()
    finally:
        ending.set()
        asking.join(60)
    # Latencies depend on the machine.
    assert {name for name in alerts if "Latency" not in name and "Slow" not in name} == set()
