"""The same promises on other deployments: KV over gRPC, a real Redis, API keys, pressure on the KV pool."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_process import MODEL, ClusterProcess, wait_until
from golden_jobs import Job
from redis_server import RedisServer
from test_exactness import check, run

pytestmark = pytest.mark.timeout(400)

KEY = "sk-for-this-test"


@pytest.fixture(scope="module")
def remote(redis_server: RedisServer) -> Iterator[ClusterProcess]:
    """Workers that behave as if on different hosts, state in Redis, keys required, pools of just over one full sequence."""
    running = ClusterProcess(
        "--prefill", "1", "--decode", "2", "--no-dashboard",
        "--store", redis_server.url,
        "--set", "worker.transports=grpc",
        "--set", "worker.kv_memory_bytes=36000000",
        "--set", "router.max_local_prefill_tokens=0",
        key=KEY,
    )  # fmt: skip
    yield running
    running.stop()


def test_kv_over_grpc_and_a_pool_under_pressure_change_no_token(remote: ClusterProcess, jobs: list[Job]) -> None:
    some = jobs[:120]
    answers = run(remote, some, key=KEY)
    check(some, answers)
    reports = [answer.trace["choices"][0] for answer in answers]
    assert {r["transport"] for r in reports} == {"grpc", "local"}
    remote.wait_idle(3)


def test_a_role_is_kept_in_redis_and_survives_the_worker(remote: ClusterProcess) -> None:
    assert remote.switch_role("decode-1", "mixed").returncode == 0
    before = remote.workers()["decode-1"]
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: remote.workers().get("decode-1", before)["pid"] != before["pid"], "decode-1 to be back")
    after = remote.workers()["decode-1"]
    assert after["role"] == "mixed" and after["generation"] > before["generation"] + 1


def test_without_the_key_nothing_is_served(remote: ClusterProcess) -> None:
    body = json.dumps({"model": MODEL.name, "prompt": "x"}).encode()
    for path, data in (("/v1/completions", body), ("/v1/models", None), ("/admin/status", None)):
        request = urllib.request.Request(remote.url + path, data, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        assert caught.value.code == 401
        assert json.load(caught.value)["error"]["message"]
    assert remote.get("/health", ok_only=False) == 200


def test_no_process_shows_the_key(remote: ClusterProcess) -> None:
    """Of the command line and the environment, which Ray's processes and those that they start inherit."""
    for pid in remote.descendants():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid != remote.pid:
                assert KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def test_the_demo_answers_every_skill_right_and_says_who_did_what() -> None:
    demo = ClusterProcess.baton("demo", "--json")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    report = json.loads(demo.stdout)
    assert Path(MODEL / "skills.json").exists()
    names = {skill["name"] for skill in json.loads((MODEL / "skills.json").read_text())["skills"]}
    assert {result["skill"] for result in report["results"]} == names
    recall = next(result for result in report["results"] if result["skill"] == "recall")
    assert (recall["prefill_worker"], recall["decode_worker"]) == ("prefill-0", "decode-0")
    assert recall["transport"] == "shm" and recall["kv_bytes"] > 0 and recall["ttft_s"] > 0


def test_interrupted_it_ends_with_everything_it_started(remote: ClusterProcess) -> None:
    everyone = remote.descendants()
    assert len(everyone) > 5
    assert remote.stop() == 0
    assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()]
