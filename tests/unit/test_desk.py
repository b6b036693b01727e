"""The operator's page: what it is told, for how long, and that only its own script runs in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import browser, program
from fake_backend import FakeBackend, serve

from router.api.bodies import OpenBodies
from router.api.callers import Callers
from router.api.desk import MAX_RANKS, MAX_VIEWERS, Desk, desk_view
from router.api.grammar_check import GrammarChecks
from router.api.metrics import Metrics
from router.api.middleware import Draining
from router.api.problems import Rejected
from router.api.services import Services
from router.api.tenant_metrics import TenantMetrics
from router.api.turns import Turns
from router.backend import ListedRouter, LoadingWorker, Lookout, RouterStatus
from router.config import ApiConfig
from router.requests.journal import Incident, Step, Way
from router.roles import RolesReport
from router.tenants.config import TenantsConfig
from router.tenants.tenancy import Tenancy
from workers.status import LoadProgress, RankStatus, Role
from workers.text.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "models" / "ernie-4.5-tiny"
EVENTS = {"accept": "text/event-stream"}


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend(Tokenizer.load(MODEL))


def test_the_page_runs_its_own_script_and_fetches_from_its_own_address_only(backend: FakeBackend) -> None:
    with serve(backend, ApiConfig(admin_keys=("root",))) as url:
        page = httpx.get(f"{url}/admin/ui", trust_env=False)
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.headers["content-security-policy"]
    assert (
        f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "connect-src 'self'" in policy
    )
    assert not re.findall(r"https?://|//cdn|innerHTML|\son\w+=\"", page.text), (
        "it works offline, and writes no markup from data"
    )
    assert "decode-0" not in page.text


def test_the_page_is_told_again_and_again_what_the_router_knows(backend: FakeBackend) -> None:
    with serve(backend, ApiConfig(admin_keys=("root",))) as url:
        assert httpx.get(f"{url}/admin/status", headers=EVENTS, trust_env=False).status_code == 401
        headers = {**EVENTS, "authorization": "Bearer root", "origin": url, "sec-fetch-site": "same-origin"}
        with httpx.stream("GET", f"{url}/admin/status", headers=headers, trust_env=False) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            told = [json.loads(line.removeprefix("data: ")) for line, _ in zip(lines(stream), range(2), strict=False)]
    assert len(told) == 2
    workers = {worker["worker_id"]: worker for worker in told[1]["workers"]}
    assert set(workers) == {"prefill-0", "decode-0"} and workers["decode-0"]["role"] == "decode"
    assert isinstance(workers["decode-0"]["generation"], str) and workers["decode-0"]["load"]["num_free_blocks"] == 7


def test_the_page_is_told_of_requests_faults_and_objectives_and_finds_the_way_of_one(backend: FakeBackend) -> None:
    steps = (Step(90.5, "sent", "decode-0", "prefill on prefill-0, least_cost"), Step(91.0, "first output", "decode-0"))
    way = Way("long-job-0", "acme", 90.0, 100, 64, 7, 1, "decode-0", "prefill-0", "decode", "", steps)
    faults = (
        Incident(99.0, "is there again", "decode-0", True),
        Incident(98.0, "lost: broken pipe", "decode-0", False),
    )
    backend.seen = Lookout(100.0, (0, 0, 1, 0, 0, 0), (way,), faults)
    backend.loading = (LoadingWorker("decode-1", Role.DECODE, LoadProgress(1, 4, 1, 2)),)
    with serve(backend, ApiConfig(admin_keys=("root",))) as url:
        headers = {"authorization": "Bearer root"}
        client = httpx.Client(base_url=url, headers=headers, trust_env=False)
        body = {"model": backend.model.name, "prompt": "x", "max_tokens": 2}  # type: ignore[union-attr]
        assert client.post("/v1/completions", json=body).status_code == 200
        with client.stream("GET", "/admin/status", headers=EVENTS) as stream:
            (told, *_) = [json.loads(line.removeprefix("data: ")) for line in lines(stream)]
        assert told["in_flight"]["counts"] == [0, 0, 1, 0, 0, 0] and told["in_flight"]["oldest"][0]["age_s"] == 10.0
        assert [(fault["ago_s"], fault["is_recovery"]) for fault in told["faults"]] == [(1.0, True), (2.0, False)]
        counts = told["objectives"]["counts"]
        assert counts == {"first_tokens": 1.0, "in_time": 1.0, "answers": 1.0, "without_fault": 1.0}
        assert told["loading"] == [
            {
                "worker_id": "decode-1",
                "role": "decode",
                "num_bytes_read": 1,
                "num_bytes": 4,
                "num_layers_begun": 1,
                "num_layers": 2,
            }
        ]
        assert client.get("/admin/status").json()["loading"][0]["progress"]["num_bytes"] == 4
        (found,) = client.get("/admin/requests/chatcmpl-long-job").json()["requests"]
        assert [(step["after_s"], step["worker_id"]) for step in found["steps"]] == [
            (0.5, "decode-0"),
            (1.0, "decode-0"),
        ]
        assert client.get("/admin/requests/nobody").status_code == 404
        assert httpx.get(f"{url}/admin/requests/long-job-0", trust_env=False).status_code == 401


def test_the_page_is_told_of_all_routers_and_of_ranks_those_that_are_gone_first() -> None:
    backend = FakeBackend(Tokenizer.load(MODEL))

    def told() -> dict[str, Any]:
        return desk_view(backend.status(), backend.lookout(), {})

    alone = {"router_id": "router-0", "url": "", "host": "", "version": "", "started_s": 0.0}
    own = {"num_running": 1, "num_waiting": 2}
    assert told()["routers"] == [alone | own] and told()["ranks"] == [], "a router that is on no list shows itself"
    backend.routers = (
        ListedRouter("router-0", "http://a:1", "a", "1", 5.0),
        ListedRouter("router-1", "http://b:1", "b"),
    )
    backend.ranks["decode-0"] = tuple(
        RankStatus(at, "host", 100 + at, 7, at != MAX_RANKS) for at in range(MAX_RANKS + 1)
    )
    first, second = told()["routers"]
    assert first == {"router_id": "router-0", "url": "http://a:1", "host": "a", "version": "1", "started_s": 5.0} | own
    assert second["router_id"] == "router-1" and "num_running" not in second
    ranks = told()["ranks"]
    assert len(ranks) == MAX_RANKS and [rank["rank"] for rank in ranks[:3]] == [MAX_RANKS, 0, 1]
    assert ranks[0]["worker_id"] == "decode-0" and not ranks[0]["is_alive"] and ranks[1]["pid"] == 100


def lines(stream: httpx.Response) -> list[str]:
    found = []
    for line in stream.iter_lines():
        if line.startswith("data: "):
            found.append(line)
        if len(found) == 2:
            break
    return found


async def test_pages_are_bounded_and_end_with_the_router(backend: FakeBackend) -> None:
    config, draining = ApiConfig(), Draining()
    tokenizer = Tokenizer.load(MODEL)
    metrics = Metrics(backend)
    callers = Callers(Tenancy(TenantsConfig()), TenantMetrics(metrics.registry, 0, lambda: False), 256)
    services = Services(
        backend, tokenizer, config, metrics, OpenBodies(config), GrammarChecks(tokenizer), Turns(tokenizer, 0), callers
    )
    desk = Desk(services, draining)
    pages = [desk.open() for _ in range(MAX_VIEWERS)]
    for page in pages:
        await anext(page)
    with pytest.raises(Rejected, match="close one"):
        desk.open()
    await pages[0].aclose()  # type: ignore[attr-defined]
    page = desk.open()
    await anext(page)
    draining.begin()
    assert [event async for event in page] == []


class LargeFleet(FakeBackend):
    """1,000 workers, of which some are lost; one more is on its way."""

    def __init__(self) -> None:
        super().__init__(Tokenizer.load(MODEL))
        names = [f"{'prefill' if at % 3 == 0 else 'decode'}-{at}" for at in range(1000)]
        self.roles = {name: Role(name.split("-")[0]) for name in names}
        self.routers = tuple(
            ListedRouter(f"router-{at}", f"http://10.0.0.{at}:8000", f"host-{at}", "0.1") for at in range(3)
        )
        self.ranks["decode-1"] = tuple(RankStatus(at, f"node-{at}", 40 + at, 3, at != 2, at < 2) for at in range(4))
        self.loading = (LoadingWorker("decode-1000", Role.DECODE, LoadProgress(21 << 30, 42 << 30, 14, 28)),)

    def role_report(self) -> RolesReport:
        """decode-1 was a prefill worker until five minutes ago."""
        step = {"worker_id": "decode-1", "source": "prefill", "target": "decode", "by": "controller", "reason": "load"}
        now = time.time()
        begun, done = {**step, "step": "begun", "at_s": now - 600}, {**step, "step": "done", "at_s": now - 300}
        report = super().role_report()
        return replace(report, page={**report.page, "audit": [begun, {**done, "why": "answers wait"}]})

    def status(self) -> RouterStatus:
        status = super().status()
        workers = (replace(view, connected=at % 97 != 5) for at, view in enumerate(status.workers))
        return replace(status, workers=tuple(workers))


@pytest.mark.skipif(program is None, reason="there is no Chromium")
def test_a_browser_shows_a_thousand_workers_and_drains_one_by_keyboard_after_asking(tmp_path: Path) -> None:
    backend = LargeFleet()
    steps = (Step(10.5, "sent", "decode-1", "least_cost"),)
    way = Way("long-job-0", "acme", 10.0, 100, 64, 7, 2, "decode-1", "prefill-0", "decode", "", steps)
    backend.seen = Lookout(
        250.0, (2, 0, 0, 0, 1, 0), (way,), (Incident(240.0, "lost: broken pipe", "decode-5", False),)
    )
    with serve(backend, ApiConfig(admin_keys=("root",))) as url, browser(tmp_path / "browser") as page:
        page.open(f"{url}/admin/ui#request=long-job")
        page.wait_for("document.activeElement?.id === 'key'")
        assert "decode-5" not in page.text(), "without the key there is nothing to see"
        page.ask("at('key').value = 'root'; at('ask').requestSubmit(); findWay()")
        page.wait_for("at('workers').rows.length")
        page.wait_for("at('way').rows.length")
        text = page.text()
        assert "989 workers 11 not connected" in text and "the first 300 of 1000" in text
        assert "decode-1000 decode 50 % 21.0 GiB 42.0 GiB 14 of 28" in text
        assert "long-job-0 acme 4 min 0 s decode decode-1 prefill-0 100 64 7 2" in text
        assert "+0.500 s sent decode-1 least_cost" in text, "the way of the request that the address names"
        assert "10 s ago decode-5 lost: broken pipe" in text
        assert "router-0 (this one) http://10.0.0.0:8000 host-0 0.1 1 2" in text
        assert "router-2 http://10.0.0.2:8000 host-2 0.1" in text
        assert "4 of 4" in text and "decode-1 2 gone node-2 42 3 its own" in text
        assert page.ask("at('workers').rows[0].cells[2].innerText") == "not connected", "those in trouble come first"
        assert page.ask("at('perWorker').open") is False, "a thousand bands are for whoever asks"
        page.ask("at('perWorker').open = true")
        page.wait_for("at('lanes').rows.length")
        assert page.ask("at('lanes').rows.length") == 64 and "the 64 of 1000 that changed most" in page.text()
        titles = "[...at('lanes').rows[0].querySelectorAll('i[title]')].map(band => band.title).join('; ')"
        page.wait_for(f"{titles}.includes('answers wait')")
        assert page.ask("at('lanes').rows[0].cells[0].innerText") == "decode-1", "who changed most comes first"
        told = page.ask(titles)
        assert re.fullmatch(r"prefill from [^;]+; decode from [^;]+: load, answers wait", told), told
        page.picture(tmp_path / "desk.png")
        page.prefer_dark()
        page.picture(tmp_path / "desk-dark.png")
        page.ask("document.querySelector('[data-id=\\'drain decode-1\\']').focus()")
        page.press("Enter")
        page.wait_for("at('confirm').open")
        assert not backend.drained, "it asks first"
        page.ask("document.querySelector('#confirm [value=yes]').focus()")
        page.press("Enter")
        page.wait_for("at('events').innerText.includes('decode-1: drain is done')")
    assert backend.drained == {"decode-1"}
