"""A cluster whose parts are containers with one command each, as on Kubernetes: here processes with loopback addresses of their own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from cluster_process import MODEL, ROOT, free_port, wait_until
from redis_server import RedisServer

pytestmark = pytest.mark.timeout(500)

QUESTION = {"model": MODEL.name, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
STORY = {"model": MODEL.name, "prompt": "A long story", "max_tokens": 1200, "temperature": 0, "ignore_eos": True}


class Pods:
    """Processes by name, each with the address that a pod would have."""

    def __init__(self, folder: Path, server: RedisServer, password: str) -> None:
        self.folder, self._server = folder, server
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self.said: dict[str, list[str]] = {}
        for name, text in (("password", password), ("secret", secrets.token_hex(16)), ("ray-token", "t" * 64)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o600)
        self.gcs_port = free_port()
        self.settings = [
            *("--set", f"store.password_file={folder}/password", "--set", f"store.secret_file={folder}/secret"),
            *("--set", f"ray.token_file={folder}/ray-token", "--store", server.url),
            *("--set", "router.max_local_prefill_tokens=0", "--set", "worker.local_prefill_tokens=0"),
        ]
        self.run("tls", "init", "--out", str(folder / "authority"))

    def run(self, *arguments: str) -> str:
        ended = subprocess.run(self._command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def certified(self, kind: str, name: str) -> list[str]:
        """What an init container does: a certificate for one process, without leaving it the authority's key."""
        own, ca = self.folder / name, self.folder / "authority"
        self.run("tls", "issue", "--ca-cert", f"{ca}/ca.crt", "--ca-key", f"{ca}/ca.key", "--out", str(own), kind, name)
        assert not (own / "ca.key").exists()
        files = {"cert": "{name}.crt", "key": "{name}.key", "ca": "ca.crt"}
        return [part for key, file in files.items() for part in ("--set", f"tls.{key}={own}/{file}")]

    def start(self, name: str, *arguments: str) -> None:
        own = Path(tempfile.mkdtemp(dir=self.folder, prefix=""))  # a pod's own /tmp
        environment = {**os.environ, "TMPDIR": str(own)}
        process = subprocess.Popen(
            self._command(*arguments, *self.settings),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes[name], lines = process, self.said.setdefault(name, [])
        stdout = process.stdout
        assert stdout is not None
        threading.Thread(target=lambda: lines.extend(stdout), daemon=True).start()

    def end(self, name: str, number: int = signal.SIGTERM) -> int:
        """As kubelet does: a signal to the first process alone."""
        process = self._processes.pop(name)
        process.send_signal(number)
        return process.wait(60)

    def close(self) -> None:
        for name in reversed(list(self._processes)):
            self._processes[name].send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def everything(self) -> str:
        return "\n".join(f"== {name}\n{''.join(lines)}" for name, lines in self.said.items())

    @staticmethod
    def _command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "cluster.cli", *arguments]


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ask(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=90) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def descendants(pid: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.fixture
def pods() -> Iterator[Pods]:
    """With a Redis that asks for a password."""
    folder = Path(tempfile.mkdtemp(prefix="bp-", dir="/tmp"))  # Ray's sockets need a short path
    password = secrets.token_hex(16)
    server = RedisServer(folder, "--requirepass", password)
    server.start()
    running = Pods(folder, server, password)
    try:
        yield running
    finally:
        running.close()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_commands_of_pods_make_a_cluster_that_outlives_its_head_and_drains(pods: Pods) -> None:
    head = ["ray", "head", "--host", "127.0.0.11", "--port", str(pods.gcs_port), "--probe-port", "8081"]
    port = free_port()
    url = f"http://127.0.0.12:{port}"
    # All at once and in any order, as Kubernetes starts pods: each waits for what it needs.
    for at, (name, role) in enumerate({"pool-a-x1": "prefill", "pool-b-x2": "decode"}.items()):
        address = f"127.0.0.{13 + at}"
        pods.start(
            name,
            *("worker", "--name", name, "--role", role, "--host", address, "--start-node", "--probe-port", "8081"),
            *("--ray-address", f"127.0.0.11:{pods.gcs_port}", *pods.certified("--worker", name)),
            *("--set", "worker.kv_memory_bytes=60000000"),
        )
    certificate = pods.certified("--router", "router-a")
    router = ["router", "--name", "router-a", "--without-ray", "--host", "127.0.0.12", "--port", str(port)]
    pods.start("router-a", *router, *certificate)
    pods.start("head", *head)
    wait_until(lambda: status_of(f"{url}/ready") == 200, 150, "the router to be ready", pods.everything)
    for address in ("127.0.0.11", "127.0.0.13", "127.0.0.14"):
        wait_until(lambda at=address: status_of(f"http://{at}:8081/ready") == 200, 60, address, pods.everything)  # type: ignore[misc]
        assert status_of(f"http://{address}:8081/health") == 200

    answer = ask(url, "/v1/chat/completions", {**QUESTION, "trace": True})
    assert "Baton" in answer["choices"][0]["message"]["content"]
    (way,) = answer["baton"]["choices"]
    assert (way["prefill_worker"], way["decode_worker"]) == ("pool-a-x1", "pool-b-x2")
    golden = ask(url, "/v1/completions", STORY)["choices"][0]["text"]

    # The head and all its processes are lost; it comes back at its address, and its tables with it from Redis.
    lost = descendants(pods.pid("head"))
    for pid in lost:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    pods.end("head", signal.SIGKILL)
    assert ask(url, "/v1/completions", STORY)["choices"][0]["text"] == golden
    pods.start("head", *head)
    wait_until(lambda: status_of("http://127.0.0.11:8081/ready") == 200, 90, "the head is back", pods.everything)
    assert ask(url, "/v1/completions", STORY)["choices"][0]["text"] == golden

    # The only decode worker is told to end under a request: that runs to its end first.
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.append(ask(url, "/v1/completions", STORY)["choices"][0]["text"]))
    asking.start()
    wait_until(lambda: ask_running(url) == 1, 30, "a request runs", pods.everything)
    assert pods.end("pool-b-x2") == 0, pods.everything()
    asking.join(60)
    assert texts == [golden], pods.everything()
    wait_until(lambda: status_of(f"{url}/ready") == 503, 30, "nobody can decode", pods.everything)

    assert pods.end("router-a") == 0 and pods.end("pool-a-x1") == 0 and pods.end("head") == 0, pods.everything()
    client = redis.Redis.from_url(pods._server.url, password=(pods.folder / "password").read_text())
    left = [key.decode() for key in client.keys("*")]
    named = [key for key in left if "pool-" in key or "router-a" in key]
    assert not [key for key in named if "control/" not in key], left  # the role controller's are leases
    assert left
    pods.run("store", "clear", *pods.settings)
    assert not client.keys("*")


def ask_running(url: str) -> int:
    with urllib.request.urlopen(f"{url}/admin/status", timeout=10) as answer:
        return int(json.load(answer)["num_running"])
