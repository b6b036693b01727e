"""The chart's other files, the image and the compose file: what they name is there, and what is generated is as it would be generated now."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml
from chart_queries import panels, rules
from chart_readme import text as readme_text
from chart_render import CHART, ROOT, render
from kube_tools import NotToBeHad, compose_schema

from cluster.cli import make_parser
from cluster.commands.flags import config_from

DOCKERFILE = ROOT / "deploy" / "image" / "Dockerfile"
RUNBOOKS = ROOT / "docs" / "runbooks"


def dashboards() -> Any:
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "deploy" / "helm" / "dashboards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboards"] = module
    spec.loader.exec_module(module)
    return module


def queries() -> Iterator[tuple[str, str]]:
    """Where each PromQL text stands, and the text, with Grafana's variables filled in."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for dashboard, panel, query in panels():
        yield f"{dashboard}: {panel}: {query}", query


def test_generated_files_are_up_to_date() -> None:
    assert (CHART / "README.md").read_text() == readme_text(), "run python -m tests.kube.chart_readme"
    module = dashboards()
    assert {path.stem for path in (CHART / "dashboards").glob("*.json")} == set(module.DASHBOARDS)
    for name in module.DASHBOARDS:
        assert (CHART / "dashboards" / f"{name}.json").read_text() == module.text_of(name), (
            "run python deploy/helm/dashboards.py"
        )


def test_every_query_is_promql_over_metrics_that_the_docs_name() -> None:
    """docs/observability.md's table is compared with what routers say in tests/unit/test_api_metrics_table.py."""
    page = (ROOT / "docs" / "observability.md").read_text()
    documented = set(re.findall(r"^\| `((?:ray_)?baton_\w+)`", page, re.M))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = dict(queries())
    assert len(asked) > 40
    for where, query in asked.items():
        promql_parser.parse(query)
        names = set(re.findall(r"\b(?:ray_)?baton[_:][\w:]*\w", query)) - recorded
        for name in names:
            family = re.sub(r"_(bucket|count|sum)$", "", name)
            assert (
                family in documented or name in documented or name in ("baton_router_workers_lost_", "baton_worker_kv_")
            ), (where, name)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    linked = {rule["annotations"]["runbook_url"].removeprefix("RUNBOOKS/") for rule in rules() if "alert" in rule}
    assert linked == {path.name for path in RUNBOOKS.glob("*.md")}
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]
    (made,) = [each for each in render("21b-h200-2p6d") if each["kind"] == "PrometheusRule"]
    urls = [
        rule["annotations"]["runbook_url"]
        for group in made["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert all(url.startswith("https://") for url in urls)


def test_the_dockerfile_is_clean_and_names_what_is_there() -> None:
    text = DOCKERFILE.read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    sources = [name for line in copied for name in line.split()]
    assert "workers" in sources and all((ROOT / name).exists() for name in sources), sources
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M))
    assert set(sources) == kept
    assert re.search(r"^USER 10001:10001$", text, re.M) and "g++" not in text.partition("AS final")[2]
    assert re.search(r'"torch==', (ROOT / "pyproject.toml").read_text())
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("hadolint's package is for Linux on x86-64 only")
    done = subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_is_one_by_the_specification() -> None:
    """Of 2021, which knew no `name`."""
    try:
        schema = compose_schema()
    except NotToBeHad as error:
        pytest.skip(str(error))
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert compose.pop("name") == "baton"
    validator = jsonschema.Draft201909Validator(json.loads(schema.read_text()))
    assert [error.message for error in validator.iter_errors(compose)] == []
    compose["services"]["router"]["restrat"] = "always"
    assert not validator.is_valid(compose)


def test_the_compose_file_holds_a_cluster_that_baton_takes(tmp_path: Any) -> None:
    """`docker compose config` is not to be had here: names that it refers to, and Baton's own reading of commands and environment."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    services = compose["services"]
    addresses = set()
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).partition(":")[0]
            assert source in compose["volumes"], (name, volume)
        for network, own in service.get("networks", {}).items():
            assert network in compose["networks"]
            addresses.add((own["ipv4_address"], service.get("profiles", ["all"])[0]))
        if name in ("setup", "redis"):
            continue
        (tmp_path / "api-keys").write_text("key")
        environment = {
            key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for key, value in service["environment"].items()
        }
        arguments = [
            part.replace("/keys/api-keys", f"{tmp_path}/api-keys").replace("/keys/admin-keys", f"{tmp_path}/api-keys")
            for part in service["command"]
        ]
        config = config_from(make_parser().parse_args(arguments), environment)
        assert config.store.url.startswith("redis://172.30.0.2") and config.tls.has_files
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace >= {
            "router": config.router.shutdown_timeout_s + 10,
            "worker": config.worker.drain_timeout_s + 75,
        }.get(arguments[0], 60)
        assert (config.worker.device == "cuda") == name.endswith("-gpu")
    assert len({address for address, _ in addresses}) == 5
