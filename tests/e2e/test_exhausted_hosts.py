"""A host that runs out of something: what is lacking is done without, what runs goes on, and all is well when there is enough again."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
import ray_listens
from cluster_process import MODEL, ClusterProcess, wait_until
from openai import OpenAI

from cluster.ray_session.processes import read_process

pytestmark = pytest.mark.timeout(400)


def router_pid(cluster: ClusterProcess) -> int:
    """The process that answers at the cluster's port; `baton serve` only keeps it open."""
    port = urlsplit(cluster.url).port
    found = [
        pid
        for pid in cluster.descendants() - {cluster.pid}
        if (process := read_process(pid)) and ("127.0.0.1", port) in ray_listens.sockets([process])
    ]
    assert len(found) == 1
    return found[0]


def test_a_router_that_may_open_no_more_files_serves_those_it_has_and_recovers(cluster: ClusterProcess) -> None:
    pid = router_pid(cluster)
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    body = {"model": MODEL.name, "prompt": "A long story", "max_tokens": 600, "temperature": 0}
    golden = client.completions.create(**body, extra_body={"ignore_eos": True}).choices[0].text  # type: ignore[call-overload]
    stream = client.completions.create(**body, stream=True, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
    text = next(iter(stream)).choices[0].text
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 8, hard))
        stack.callback(resource.prlimit, pid, resource.RLIMIT_NOFILE, (soft, hard))
        address = ("127.0.0.1", urlsplit(cluster.url).port)
        for _ in range(64):
            stack.enter_context(socket.create_connection(address, timeout=30))
        for chunk in stream:
            text += "".join(choice.text for choice in chunk.choices)
    assert text == golden
    wait_until(lambda: router_pid(cluster) == pid and cluster.get("/ready", ok_only=False) == 200, "the router")
    assert client.completions.create(**body, extra_body={"ignore_eos": True}).choices[0].text == golden  # type: ignore[call-overload]
