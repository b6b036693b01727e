"""Workers and routers that join a running cluster, and leave it again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from cluster_process import MODEL, ROOT, ClusterProcess, free_port, wait_until
from openai import OpenAI

from router.resume import ResumingClient

pytestmark = pytest.mark.timeout(400)


@contextmanager
def joined(*arguments: str, ends_by: int = signal.SIGINT) -> Iterator[str]:
    """Runs `baton worker` or `baton router` until it serves; yields what it said; ends it as Ctrl-C does, or by another signal."""
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
        process.send_signal(ends_by)
        process.stdout.read()
        assert process.wait(60) in (0, 128 + ends_by)


@contextmanager
def joined_router(cluster: ClusterProcess, name: str, ends_by: int = signal.SIGINT) -> Iterator[str]:
    """Yields its URL."""
    arguments = ("router", "--name", name, "--port", str(free_port()), "--ray-address", cluster.ray_address)
    with joined(*arguments, ends_by=ends_by) as said:
        found = re.search(r"http://[\d.]+:\d+", said)
        assert found, said
        yield found[0]


def test_a_worker_joins_serves_and_leaves_while_requests_run(cluster: ClusterProcess) -> None:
    before = set(cluster.workers())
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    body = {"model": MODEL.name, "prompt": "A long story", "max_tokens": 1500, "temperature": 0}
    golden = client.completions.create(**body, extra_body={"ignore_eos": True}).choices[0].text  # type: ignore[call-overload]
    with joined("worker", "--name", "decode-9", "--role", "decode", "--ray-address", cluster.ray_address):
        wait_until(lambda: "decode-9" in cluster.workers(), "decode-9 to be connected")
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
    wait_until(lambda: set(cluster.workers()) == before, "decode-9 to be gone")
    cluster.wait_idle(len(before))


def test_a_second_router_serves_the_same_workers(cluster: ClusterProcess) -> None:
    with joined_router(cluster, "router-9") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
        answer = client.chat.completions.create(
            model=MODEL.name, messages=[{"role": "user", "content": "Who are you?"}], temperature=0
        )
        assert "Baton" in (answer.choices[0].message.content or "")


def test_routers_join_and_leave_under_load_and_no_request_fails(cluster: ClusterProcess) -> None:
    """One that is stopped lets its streams end, and turns away what comes then before anything of it runs, to be sent elsewhere."""
    before, over, served = set(cluster.workers()), threading.Event(), set[str]()
    body = {"model": MODEL.name, "prompt": "A long story", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    with ResumingClient(cluster.url) as client:
        golden = client.create("/v1/completions", body)["choices"][0]["text"]

    def ask(begun: threading.Semaphore, *urls: str) -> list[str]:
        """One stream after the other, of the first router that takes it."""
        texts = list[str]()
        with ResumingClient(urls) as client:
            while not over.is_set():
                text, num_resumed = "", -1
                for event in client.stream("/v1/completions", body):
                    if num_resumed < 0:
                        num_resumed = client.num_resumed
                        served.add(client.url)
                        begun.release()
                    text += "".join(choice["text"] for choice in event["choices"])
                assert client.num_resumed == num_resumed, "a stream that had begun was cut"
                texts.append(text)
        return texts

    with ThreadPoolExecutor(6) as pool, ExitStack() as staying, ExitStack() as leaving:
        staying.callback(over.set)
        ninth = leaving.enter_context(joined_router(cluster, "router-9", signal.SIGTERM))
        begun = [threading.Semaphore(0) for _ in range(6)]
        answers = [pool.submit(ask, each, cluster.url, ninth) for each in begun[:2]]
        answers += [pool.submit(ask, each, ninth, cluster.url) for each in begun[2:4]]
        assert all(each.acquire(timeout=60) for each in begun[:4])
        tenth = staying.enter_context(joined_router(cluster, "router-10"))
        answers += [pool.submit(ask, each, tenth, cluster.url) for each in begun[4:]]
        assert all(each.acquire(timeout=60) for each in begun[4:])
        leaving.close()
        for each in begun:  # whoever was with it has begun anew elsewhere
            while each.acquire(blocking=False):
                pass
            assert each.acquire(timeout=60)
        over.set()
        texts = [text for answer in answers for text in answer.result(timeout=60)]
    assert len(texts) >= 12 and set(texts) == {golden} and served == {cluster.url, ninth, tenth}
    cluster.wait_idle(len(before))
