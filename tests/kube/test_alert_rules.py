"""The chart's alerts, evaluated by Prometheus' own `promtool` over made-up hours: each fires in its scenario and in no other, and none without one."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_queries import rules
from chart_render import CHART
from kube_tools import NotToBeHad, prometheus

MINUTES = 480
BEGINS = 420
"""The minute at which a scenario's trouble begins; before it nothing may fire."""
Series = Mapping[str, str]


def changed(before: str, after: str, begins: int = BEGINS) -> str:
    """Values by the minute, in promtool's notation; both parts are expanded there."""
    return f"{before}x{begins - 1} {after}x{MINUTES - begins}"


TTFT = "baton_time_to_first_token_seconds"
REQUESTS = 'baton_requests_total{endpoint="/v1/completions",refusal="",instance="r"'
HEALTHY: Series = {
    'baton_num_requests_waiting{instance="r"}': f"0x{MINUTES}",
    'baton_num_requests_running{instance="r"}': f"10x{MINUTES}",
    'baton_worker_up{worker_id="p-0",role="prefill",instance="r"}': f"1x{MINUTES}",
    'baton_worker_up{worker_id="p-1",role="prefill",instance="r"}': f"1x{MINUTES}",
    'baton_worker_up{worker_id="d-0",role="decode",instance="r"}': f"1x{MINUTES}",
    REQUESTS + ',status="200"}': f"0+600x{MINUTES}",
    REQUESTS + ',status="500"}': f"0x{MINUTES}",
    REQUESTS + ',status="429"}': f"0x{MINUTES}",
    TTFT + '_bucket{le="2.5",instance="r"}': f"0+600x{MINUTES}",
    TTFT + '_bucket{le="+Inf",instance="r"}': f"0+600x{MINUTES}",
    TTFT + '_count{instance="r"}': f"0+600x{MINUTES}",
    'baton_worker_preemptions_total{worker_id="d-0",instance="r"}': f"0x{MINUTES}",
    'baton_worker_speed_ratio{worker_id="d-0",instance="r"}': f"1x{MINUTES}",
    'baton_kv_handoff_degradations_total{instance="r"}': f"0x{MINUTES}",
    'baton_kv_handoff_extra_attempts_total{instance="r"}': f"0x{MINUTES}",
}
SCENARIOS: dict[str, Series] = {
    "BatonRouterMissing": {name: changed(values.removesuffix(f"x{MINUTES}"), "_") for name, values in HEALTHY.items()},
    "BatonCannotDecode": {'baton_worker_up{worker_id="d-0",role="decode",instance="r"}': changed("1", "_")},
    "BatonWorkerDown": {'baton_worker_up{worker_id="p-1",role="prefill",instance="r"}': changed("1", "0")},
    "BatonWorkersLost": {
        'baton_router_workers_lost_stale_total{instance="r"}': changed("_", "1+1"),
        'baton_router_workers_lost_detached_total{instance="r"}': f"1x{MINUTES}",
    },
    "BatonErrorBudgetFast": {REQUESTS + ',status="500"}': changed("0", "30+30")},
    "BatonErrorBudgetSlow": {REQUESTS + ',status="500"}': changed("0", "6+6", 120)},
    "BatonLatencyBudgetFast": {TTFT + '_bucket{le="2.5",instance="r"}': changed("0+600", f"{BEGINS * 600}+300")},
    "BatonLatencyBudgetSlow": {TTFT + '_bucket{le="2.5",instance="r"}': changed("0+600", f"{120 * 600}+540", 120)},
    "BatonRefusesRequests": {REQUESTS + ',status="429"}': changed("0", "100+100")},
    "BatonQueueLong": {'baton_num_requests_waiting{instance="r"}': changed("0", "100")},
    "BatonKvPoolFull": {'baton_worker_preemptions_total{worker_id="d-0",instance="r"}': changed("0", "12+12")},
    "BatonWorkerSlow": {'baton_worker_speed_ratio{worker_id="d-0",instance="r"}': changed("1", "2")},
    "BatonRoleSwitchesFail": {
        'baton_role_switches_total{from="decode",to="prefill",reason="load",outcome="rolled_back",instance="r"}': changed("0", "1+1")
    },
    "BatonRolesUnsteady": {
        'baton_role_switches_total{from="decode",to="prefill",reason="load",outcome="done",instance="r"}': changed("0", "1+1")
    },
    "BatonTenantLimited": {
        'baton_tenant_requests_total{tenant="a",outcome="ok",instance="r"}': f"0+60x{MINUTES}",
        'baton_tenant_limited_total{tenant="a",limit="requests",instance="r"}': f"0+30x{MINUTES}",
        'baton_tenant_limited_total{tenant="b",limit="requests",instance="r"}': changed("0", "60+60"),
    },
    "BatonHandoffsDegraded": {'baton_kv_handoff_degradations_total{instance="r"}': changed("0", "12+12")},
    "BatonKvCorrupt": {'baton_worker_kv_disk_corrupt_blocks_total{worker_id="d-0",instance="r"}': changed("_", "1")},
    "BatonKvDiskOff": {'baton_worker_kv_disk_failures_total{worker_id="d-0",instance="r"}': changed("_", "1")},
}  # fmt: skip
LONG_BEFORE = {name for name in SCENARIOS if name.endswith("BudgetSlow")}


def hours_of(series: Series, firing: dict[str, list[str]]) -> dict[str, Any]:
    """A test of promtool: which alerts fire at which minute of these series, those that are healthy else."""
    whole = {**HEALTHY, **series}
    asked = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in whole.items()],
        "promql_expr_test": [
            {
                "expr": asked,
                "eval_time": at,
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
            }
            for at, names in firing.items()
        ],
    }


def test_every_alert_fires_in_its_scenario_alone(tmp_path: Path) -> None:
    try:
        promtool = prometheus("promtool")
    except NotToBeHad as error:
        pytest.skip(str(error))
    assert set(SCENARIOS) == {rule["alert"] for rule in rules() if "alert" in rule}
    tests = [hours_of({}, {"60m": [], "460m": []})]
    for name, series in SCENARIOS.items():
        before = {} if name in LONG_BEFORE else {f"{BEGINS - 10}m": []}
        tests.append(hours_of(series, {**before, f"{BEGINS + 40}m": [name]}))
    (tmp_path / "rules.yaml").write_text((CHART / "alerts.yaml").read_text())
    (tmp_path / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    done = subprocess.run([promtool, "test", "rules", "tests.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
