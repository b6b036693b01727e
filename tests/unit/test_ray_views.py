"""What Ray's views are told of workers and routers, and what stands in the logs that Ray shows under their actors."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from builders import make_request

from cluster.actors.ray_gauges import (
    ROUTER_GAUGES,
    WORKER_GAUGES,
    RayGauges,
    is_in_ray,
    router_reading,
    worker_reading,
)
from cluster.config import LogConfig
from cluster.logs import PACKAGES, Formatter, write_logs
from router.backend import RouterStatus, WorkerView
from workers.status import Load, ModelInfo, Role, WorkerStatus

ROOT = Path(__file__).parents[2]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATUS = WorkerStatus(
    "decode-0", (7 << 32) + 2, Role.DECODE, ModelInfo("m", "f", 10, 10, 64), Load(3, 5, 1, num_free_blocks=30, num_blocks=40)
)  # fmt: skip


class Gauge:
    """Of ray.util.metrics, without Ray: it takes the tags that it was made with, and no others."""

    told: ClassVar[dict[tuple[str, ...], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self._name, self._tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert tags is not None and set(tags) == set(self._tag_keys)
        self.told[(self._name, *(tags[key] for key in self._tag_keys))] = value


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """What is written; afterwards messages go where they went before."""
    root = logging.getLogger()
    before, levels = (root.handlers[:], root.level), {name: logging.getLogger(name).level for name in PACKAGES}
    yield io.StringIO()
    root.handlers[:], root.level = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_worker_has_one_role_and_a_router_counts_who_is_connected() -> None:
    assert not is_in_ray()
    gauges = RayGauges("worker_id", "decode-0", WORKER_GAUGES, Gauge)
    gauges.tell(worker_reading(STATUS))
    told = Gauge.told
    roles = {role: told["baton_worker_role", "decode-0", role] for role in Role}
    assert roles == {Role.PREFILL: 0.0, Role.DECODE: 1.0, Role.MIXED: 0.0}
    assert told["baton_worker_kv_used_ratio", "decode-0"] == 0.25
    assert told["baton_worker_num_waiting", "decode-0"] == 3 and told["baton_worker_switches", "decode-0"] == 2
    gauges.tell(worker_reading(replace(STATUS, role=Role.PREFILL, load=Load())))
    assert (
        told["baton_worker_role", "decode-0", Role.DECODE] == 0 and told["baton_worker_kv_used_ratio", "decode-0"] == 0
    )
    views = tuple(WorkerView(STATUS, connected, 0.1, 2) for connected in (True, True, False))
    RayGauges("router_id", "router-0", ROUTER_GAUGES, Gauge).tell(router_reading(RouterStatus("router-0", views, 4, 9)))
    assert told["baton_router_num_workers", "router-0"] == 2 and told["baton_router_num_workers_lost", "router-0"] == 1
    assert {name for name, *_ in told} == {*WORKER_GAUGES, *ROUTER_GAUGES}
    page = (ROOT / "docs" / "observability.md").read_text()
    assert set(re.findall(r"^\| `ray_(\w+)` \| gauge ", page, re.M)) == {*WORKER_GAUGES, *ROUTER_GAUGES}


def test_a_message_about_a_request_names_it_and_its_trace_and_stays_on_one_line(logs: io.StringIO) -> None:
    write_logs(LogConfig(), "decode-0", logs)
    about = replace(make_request([1], request_id="chat-1"), traceparent=TRACE)
    logging.getLogger("workers.serving").warning("refused: %s", "first\nsecond", extra=about.log_fields)
    (line,) = logs.getvalue().splitlines()
    assert (
        " WARNING decode-0 request_id=chat-1 trace_id=0af7651916cd43dd8448eb211c80319c refused: first\\nsecond" in line
    )


def test_json_has_an_object_a_line_and_the_level_is_about_batons_own_messages(logs: io.StringIO) -> None:
    write_logs(LogConfig("text"), "before", io.StringIO())
    write_logs(LogConfig("json", "debug"), "decode-0", logs)
    assert sum(isinstance(handler.formatter, Formatter) for handler in logging.getLogger().handlers) == 1
    logging.getLogger("httpx").info("somebody else's")
    logging.getLogger("workers.serving").debug("takes a request", extra=make_request([1]).log_fields)
    try:
        raise ValueError("no\nway")
    except ValueError:
        logging.getLogger("router").exception("failed")
    first, second = map(json.loads, logs.getvalue().splitlines())
    assert (first["name"], first["level"], first["request_id"]) == (
        "decode-0",
        "debug",
        "r",
    ) and "trace_id" not in first
    assert second["message"] == "failed" and "ValueError: no\nway" in second["exception"] and "request_id" not in second
