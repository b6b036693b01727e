"""The operator's page: what it is told, for how long, and that only its own script runs in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import httpx
import pytest
from fake_backend import FakeBackend, serve

from router.api.answer import Services
from router.api.bodies import OpenBodies
from router.api.callers import Callers
from router.api.desk import MAX_VIEWERS, Desk
from router.api.grammar_check import GrammarChecks
from router.api.metrics import Metrics
from router.api.middleware import Draining
from router.api.problems import Rejected
from router.api.tenant_metrics import TenantMetrics
from router.api.turns import Turns
from router.config import ApiConfig
from router.tenants.config import TenantsConfig
from router.tenants.tenancy import Tenancy
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
