"""Writes the chart's Grafana dashboards from the tables below: `python deploy/helm/dashboards.py`. A test compares them with the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "baton" / "dashboards"
WIDTH, HEIGHT = 12, 8
"""Of a panel, of 24 columns."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph: its lines as PromQL with a legend each; `kind` is Grafana's."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    help: str = ""
    kind: str = "timeseries"
    stacked: bool = False


def rate(metric: str, by: str = "", window: str = "$__rate_interval") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[{window}]))"


def or_none(query: str, by_worker: bool = False) -> str:
    """Zero where nothing was counted yet: a counter with labels is there from its first event on."""
    return f"{query} or {'0 * sum by (worker_id) (baton_worker_up)' if by_worker else 'vector(0)'}"


def quantiles(metric: str, *shares: float) -> tuple[tuple[str, str], ...]:
    return tuple(
        (
            f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le')})",
            f"p{round(share * 100)}",
        )
        for share in shares
    )


IN_TIME = rate('baton_time_to_first_token_seconds_bucket{le="2.5"}')
OUR_ERRORS = rate('baton_requests_total{status=~"5.."}')

DASHBOARDS: dict[str, tuple[str, Sequence[Panel]]] = {
    "overview": (
        "Baton / Overview",
        (
            Panel(
                "Requests by status",
                "reqps",
                (
                    (
                        rate('baton_requests_total{endpoint=~"/v1/.*"}', "status"),
                        "{{status}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Refused, by reason",
                "reqps",
                (
                    (
                        or_none(rate('baton_requests_total{refusal!=""}', "refusal")),
                        "{{refusal}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Running and waiting",
                "short",
                (
                    ("sum(baton_num_requests_running)", "running"),
                    ("sum(baton_num_requests_waiting)", "waiting"),
                ),
            ),
            Panel(
                "Tokens",
                "short",
                (
                    (rate("baton_prompt_tokens_total"), "prompt /s"),
                    (
                        rate("baton_cached_prompt_tokens_total"),
                        "prompt, from a cache /s",
                    ),
                    (rate("baton_generation_tokens_total"), "generated /s"),
                ),
            ),
            Panel(
                "Workers by role",
                "short",
                (("sum by (role) (baton_worker_up)", "{{role}}"),),
                "Bands change where workers switch.",
                stacked=True,
            ),
            Panel(
                "Time to first token",
                "s",
                quantiles("baton_time_to_first_token_seconds", 0.5, 0.95, 0.99),
            ),
        ),
    ),
    "latency": (
        "Baton / Latency and objectives",
        (
            Panel(
                "Time to first token",
                "s",
                quantiles("baton_time_to_first_token_seconds", 0.5, 0.9, 0.99),
            ),
            Panel(
                "Between tokens",
                "s",
                quantiles("baton_inter_token_latency_seconds", 0.5, 0.9, 0.99),
            ),
            Panel(
                "Whole requests",
                "s",
                quantiles("baton_e2e_request_latency_seconds", 0.5, 0.9, 0.99),
            ),
            Panel(
                "Until a decode worker had room",
                "s",
                quantiles("baton_decode_queue_seconds", 0.5, 0.9, 0.99),
            ),
            Panel(
                "First tokens within 2.5 s",
                "percentunit",
                (
                    (
                        f"{IN_TIME} / {rate('baton_time_to_first_token_seconds_count')}",
                        "share",
                    ),
                ),
                "What the alerts BatonLatencyBudget look at.",
            ),
            Panel(
                "Answers that are no errors of ours",
                "percentunit",
                (
                    (
                        f"1 - ({OUR_ERRORS} or vector(0)) / {rate('baton_requests_total')}",
                        "share",
                    ),
                ),
                "What the alerts BatonErrorBudget look at.",
            ),
            Panel(
                "Measured over foretold first tokens",
                "short",
                (("baton_ttft_forecast_ratio", "{{quantile}}"),),
                "1: as foretold.",
            ),
            Panel("Learnt times", "s", (("baton_forecast_seconds", "{{kind}} {{work}}"),)),
        ),
    ),
    "kv": (
        "Baton / KV and handoffs",
        (
            Panel(
                "Handed over",
                "Bps",
                ((rate("baton_kv_handoff_bytes_total", "transport"), "{{transport}}"),),
                stacked=True,
            ),
            Panel(
                "Duration of a handoff",
                "s",
                quantiles("baton_kv_handoff_seconds", 0.5, 0.9, 0.99),
            ),
            Panel(
                "What a handoff adds to the first token",
                "s",
                quantiles("baton_kv_handoff_exposed_seconds", 0.5, 0.9, 0.99),
            ),
            Panel(
                "Until its first piece",
                "s",
                quantiles("baton_kv_handoff_wait_seconds", 0.5, 0.9, 0.99),
            ),
            Panel(
                "Handoffs that did not go straight",
                "short",
                (
                    (
                        rate("baton_kv_handoff_extra_attempts_total"),
                        "further attempts /s",
                    ),
                    (
                        rate("baton_kv_handoff_degradations_total"),
                        "changes of transport /s",
                    ),
                    (
                        rate("baton_kv_handoff_resent_pieces_total"),
                        "pieces sent again /s",
                    ),
                ),
            ),
            Panel(
                "Lost handoffs, by how they were answered",
                "short",
                ((or_none(rate("baton_kv_handoff_recoveries_total", "way")), "{{way}}"),),
            ),
            Panel(
                "Blocks in use",
                "percentunit",
                (
                    (
                        "1 - baton_worker_num_free_blocks / (baton_worker_num_blocks > 0)",
                        "{{worker_id}}",
                    ),
                ),
            ),
            Panel(
                "Prompt tokens found in a cache",
                "percentunit",
                (
                    (
                        f"{rate('baton_cached_prompt_tokens_total')} / {rate('baton_prompt_tokens_total')}",
                        "share",
                    ),
                ),
            ),
        ),
    ),
    "ray": (
        "Baton / Ray's gauges",
        (
            Panel(
                "Workers by role",
                "short",
                (("sum by (role) (ray_baton_worker_role)", "{{role}}"),),
                "As the workers tell Ray, without a router between.",
                stacked=True,
            ),
            Panel(
                "KV in use",
                "percentunit",
                (("ray_baton_worker_kv_used_ratio", "{{worker_id}}"),),
            ),
            Panel(
                "Running and waiting on workers",
                "short",
                (
                    ("sum(ray_baton_worker_num_running)", "running"),
                    ("sum(ray_baton_worker_num_waiting)", "waiting"),
                    ("sum(ray_baton_worker_num_transferring)", "handoffs"),
                ),
            ),
            Panel(
                "Switches and lost ranks since the start",
                "short",
                (("ray_baton_worker_switches", "{{worker_id}}"),),
            ),
        ),
    ),
    "workers": (
        "Baton / Workers",
        (
            Panel(
                "Connected",
                "short",
                (("baton_worker_up", "{{worker_id}} {{role}}"),),
                "0: known, and no stream.",
                kind="state-timeline",
            ),
            Panel(
                "Running",
                "short",
                (("baton_worker_num_running", "{{worker_id}}"),),
                stacked=True,
            ),
            Panel(
                "Waiting there",
                "short",
                (("baton_worker_num_waiting", "{{worker_id}}"),),
                stacked=True,
            ),
            Panel(
                "Handoffs under way",
                "short",
                (("baton_worker_num_transferring", "{{worker_id}}"),),
                stacked=True,
            ),
            Panel(
                "Speed in relation to its kind",
                "short",
                (("baton_worker_speed_ratio", "{{worker_id}}"),),
                "Above 1: slower.",
            ),
            Panel(
                "Preemptions",
                "short",
                (
                    (
                        or_none(rate("baton_worker_preemptions_total", "worker_id"), by_worker=True),
                        "{{worker_id}} /s",
                    ),
                ),
            ),
            Panel(
                "Workers that routers lost",
                "short",
                tuple(
                    (or_none(f"sum(increase(baton_router_workers_lost_{reason}_total[5m]))"), reason)
                    for reason in ("detached", "stale", "moved", "left")
                ),
                "By what was noticed.",
            ),
            Panel(
                "Migrations",
                "short",
                (
                    (or_none(rate("baton_router_migrations_done_total")), "done /s"),
                    (or_none(rate("baton_router_migrations_refused_total")), "refused /s"),
                ),
            ),
        ),
    ),
    "roles": (
        "Baton / Roles",
        (
            Panel("Workers by role", "short", (("sum by (role) (baton_worker_up)", "{{role}}"),), stacked=True),
            Panel(
                "Switches, by reason and outcome",
                "short",
                (
                    (
                        or_none("sum by (reason, outcome) (increase(baton_role_switches_total[5m]))"),
                        "{{reason}} {{outcome}}",
                    ),
                ),
                "In five minutes.",
            ),
            Panel(
                "Switches, from which role to which",
                "short",
                ((or_none("sum by (from, to) (increase(baton_role_switches_total[5m]))"), "{{from}} to {{to}}"),),
                "In five minutes.",
            ),
            Panel(
                "How long phases of switches took",
                "s",
                ((or_none("max by (phase, quantile) (baton_role_switch_phase_seconds)"), "{{phase}} {{quantile}}"),),
            ),
            Panel(
                "Workers wanted, and there",
                "short",
                (
                    (or_none("max(baton_desired_workers)"), "wanted"),
                    ("count(count by (worker_id) (baton_worker_up == 1))", "there"),
                ),
                "Wanted by the load in all; 0: not known.",
            ),
            Panel(
                "What the last change of roles gained",
                "reqps",
                ((or_none("max by (kind) (baton_role_gain_requests_per_second)"), "{{kind}}"),),
                "Good requests a second, as predicted and as measured 30 s later.",
            ),
            Panel(
                "Whose role controller acts", "short", (("baton_roles_leader", "{{instance}}"),), kind="state-timeline"
            ),
        ),
    ),
    "tenants": (
        "Baton / Tenants",
        (
            Panel(
                "Requests",
                "reqps",
                ((or_none(rate("baton_tenant_requests_total", "tenant")), "{{tenant}}"),),
                stacked=True,
            ),
            Panel(
                "Requests that did not end well",
                "reqps",
                (
                    (
                        or_none(rate('baton_tenant_requests_total{outcome!="ok"}', "tenant, outcome")),
                        "{{tenant}} {{outcome}}",
                    ),
                ),
            ),
            Panel(
                "Tokens generated",
                "short",
                ((or_none(rate('baton_tenant_tokens_total{kind="output"}', "tenant")), "{{tenant}} /s"),),
                stacked=True,
            ),
            Panel(
                "Tokens of prompts",
                "short",
                ((or_none(rate('baton_tenant_tokens_total{kind="input"}', "tenant")), "{{tenant}} /s"),),
                stacked=True,
            ),
            Panel(
                "Refused by an allowance",
                "reqps",
                ((or_none(rate("baton_tenant_limited_total", "tenant, limit")), "{{tenant}} {{limit}}"),),
            ),
        ),
    ),
    "gpus": (
        "Baton / GPUs",
        (
            Panel("Busy", "percent", (("max by (Hostname, gpu) (DCGM_FI_DEV_GPU_UTIL)", "{{Hostname}} {{gpu}}"),)),
            Panel(
                "Memory in use",
                "percentunit",
                (
                    (
                        "max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE))",
                        "{{Hostname}} {{gpu}}",
                    ),
                ),
            ),
            Panel("Power", "watt", (("max by (Hostname, gpu) (DCGM_FI_DEV_POWER_USAGE)", "{{Hostname}} {{gpu}}"),)),
            Panel(
                "Temperature", "celsius", (("max by (Hostname, gpu) (DCGM_FI_DEV_GPU_TEMP)", "{{Hostname}} {{gpu}}"),)
            ),
            Panel("Clock", "hertz", (("1e6 * max by (Hostname, gpu) (DCGM_FI_DEV_SM_CLOCK)", "{{Hostname}} {{gpu}}"),)),
            Panel(
                "Errors that the driver reported",
                "short",
                (("max by (Hostname, gpu) (DCGM_FI_DEV_XID_ERRORS)", "{{Hostname}} {{gpu}}"),),
                "The number of the last one; 0: none.",
            ),
        ),
    ),
}


def dashboard(name: str) -> dict[str, Any]:
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"baton-{name}",
        "title": title,
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
        "panels": [_panel(at, panel) for at, panel in enumerate(panels)],
    }


def _panel(at: int, panel: Panel) -> dict[str, Any]:
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 30} if panel.stacked else {}
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": at + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": source,
        "gridPos": {
            "x": at % 2 * WIDTH,
            "y": at // 2 * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {
            "legend": {
                "displayMode": "table",
                "placement": "right",
                "calcs": ["lastNotNull"],
            }
        }
        if panel.kind == "timeseries"
        else {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "expr": query,
                "legendFormat": legend,
                "datasource": source,
            }
            for number, (query, legend) in enumerate(panel.lines)
        ],
    }


def text_of(name: str) -> str:
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(text_of(each))
