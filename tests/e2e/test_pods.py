"""The chart's pods as processes of this machine (tests/e2e/chart_pods.py): they find each other, lose their head, drain, and leave nothing."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from chart_pods import ChartPods
from cluster_process import MODEL, wait_until

pytestmark = pytest.mark.timeout(500)

QUESTION = {"model": MODEL.name, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
STORY = {"model": MODEL.name, "prompt": "A long story", "max_tokens": 1200, "temperature": 0, "ignore_eos": True}
HEAD, ROUTER, PREFILL, DECODE = (f"127.0.0.{at}" for at in (11, 12, 13, 14))


@pytest.fixture
def running() -> Iterator[ChartPods]:
    started = ChartPods(
        "cpu-tryout",
        "routers.endpointSeconds=1",
        "poolDefaults.worker.kv_memory_bytes=60MiB",
        "poolDefaults.worker.local_prefill_tokens=0",
        "routers.router.max_local_prefill_tokens=0",
    )
    try:
        yield started
    finally:
        started.close()


class Client:
    """Of the router, with the release's keys."""

    def __init__(self, running: ChartPods) -> None:
        self._url = f"http://{ROUTER}:{running.http_port}"
        self._keys = {kind: running.secret("baton-keys", f"{kind}-keys") for kind in ("api", "admin")}

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._send(path, "api", json.dumps(body).encode())

    def num_running(self) -> int:
        return int(self._send("/admin/status", "admin")["num_running"])

    def story(self) -> str:
        return str(self.ask("/v1/completions", STORY)["choices"][0]["text"])

    def _send(self, path: str, kind: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._keys[kind]}"}
        with urllib.request.urlopen(urllib.request.Request(self._url + path, body, headers), timeout=90) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def test_the_charts_pods_serve_outlive_their_head_drain_and_leave_nothing(running: ChartPods) -> None:
    # In any order, as Kubernetes starts pods: each waits for what it needs.
    prefill = running.start("prefill", PREFILL, HEAD)
    decode = running.start("decode", DECODE, HEAD)
    router = running.start("router", ROUTER, HEAD)
    head = running.start("ray-head", HEAD, HEAD)
    for pod in (head, prefill, decode, router):
        running.wait(pod)
    running.wait(router, "/ready")
    client = Client(running)
    answer = client.ask("/v1/chat/completions", {**QUESTION, "trace": True})
    assert "Baton" in answer["choices"][0]["message"]["content"]
    (way,) = answer["baton"]["choices"]
    assert (way["prefill_worker"], way["decode_worker"], way["transport"]) == (prefill, decode, "shm")
    golden = client.story()

    # The head and all its processes are lost; a new pod has its address, and its tables from Redis. Workers have not noticed.
    running.kill(head)
    assert client.story() == golden
    head = running.start("ray-head", HEAD, HEAD)
    running.wait(head)
    assert client.story() == golden

    # The only decode worker is told to end under a request: that runs to its end first.
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.append(client.story()))
    asking.start()
    wait_until(lambda: client.num_running() == 1, 30, "a request runs", running.everything)
    assert running.end(decode) == 0, running.everything()
    asking.join(60)
    assert texts == [golden], running.everything()
    running.wait(router, "/ready", 503)

    for pod in (router, prefill, head):
        assert running.end(pod) == 0, running.everything()
    store = redis.Redis.from_url(running.redis.url, password=running.secret("baton-secrets", "redis-password"))
    left = [key.decode() for key in store.keys("*")]
    assert left and not [key for key in left if "baton:{" in key and key.endswith((router, prefill, decode))], left
    running.uninstall()
    assert not store.keys("*")
