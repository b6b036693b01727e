"""Workers and routers that join a running cluster, and leave it again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cluster_process import MODEL, ROOT, ClusterProcess, free_port, wait_until
from openai import OpenAI

pytestmark = pytest.mark.timeout(200)


@contextmanager
def joined(*arguments: str) -> Iterator[str]:
    """Runs `baton worker` or `baton router` until it serves; yields what it said; ends it as Ctrl-C does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Ctrl-C removes it" in line:
            break
    try:
        assert "Ctrl-C removes it" in said, said
        yield said
    finally:
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) in (0, 130)


def test_a_worker_joins_serves_and_leaves_while_requests_run(cluster: ClusterProcess) -> None:
    before = set(cluster.workers())
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    body = {"model": MODEL.name, "prompt": "A long story", "max_tokens": 1500, "temperature": 0}
    golden = client.completions.create(**body, extra_body={"ignore_eos": True}).choices[0].text  # type: ignore[call-overload]
    with joined("worker", "--name", "decode-9", "--role", "decode", "--ray-address", cluster.ray_address):
        wait_until(lambda: "decode-9" in cluster.workers(), 30, "decode-9 to be connected")
        used = set()
        streams = [
            client.completions.create(**body, stream=True, extra_body={"ignore_eos": True, "trace": True})  # type: ignore[call-overload]
            for _ in range(6)
        ]
        texts = [next(iter(stream)).choices[0].text for stream in streams]
        rerun = cluster.get("/admin/status")["counters"].get("reruns_shutting_down", 0)
    # decode-9 is gone; what ran on it has moved, and goes on elsewhere.
    assert cluster.get("/admin/status")["counters"].get("reruns_shutting_down", 0) == rerun
    for index, stream in enumerate(streams):
        for chunk in stream:
            texts[index] += "".join(choice.text for choice in chunk.choices)
            trace = getattr(chunk, "baton", None)
            used |= {choice["decode_worker"] for choice in trace["choices"]} if trace else set()
    assert texts == [golden] * 6
    assert used
    wait_until(lambda: set(cluster.workers()) == before, 30, "decode-9 to be gone")
    cluster.wait_idle(len(before))


def test_a_second_router_serves_the_same_workers(cluster: ClusterProcess) -> None:
    with joined(
        "router", "--name", "router-9", "--port", str(free_port()), "--ray-address", cluster.ray_address
    ) as said:
        found = re.search(r"http://[\d.]+:\d+", said)
        assert found, said
        client = OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=5)
        answer = client.chat.completions.create(
            model=MODEL.name, messages=[{"role": "user", "content": "Who are you?"}], temperature=0
        )
        assert "Baton" in (answer.choices[0].message.content or "")
