"""Starts a cluster the way a user does, as `baton serve` in a process of its own, and looks at it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "ernie-4.5-tiny"
WAIT_S = 120.0


class ClusterProcess:
    """A running `baton serve`; `url` is where its router listens."""

    def __init__(self, *flags: str, key: str = "", roles: str = "off") -> None:
        """`key` opens the API and /admin; workers change roles by themselves (`roles.mode`) only where a test is about that."""
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._environment = os.environ | ({"BATON_API_KEY": key, "BATON_ADMIN_KEY": key} if key else {})
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cluster.cli",
                "serve",
                "--port",
                str(free_port()),
                "--set",
                f"roles.mode={roles}",
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=self._environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.banner = self._read_banner()
        found = re.search(r"(http://[^/\s]+)/v1", self.banner)
        assert found, self.banner
        self.url = found[1]
        address = re.search(r"Ray +(\S+:\d+)\n", self.banner)
        assert address, self.banner
        self.ray_address = address[1]
        token = re.search(r"Ray's token +in (\S+)\n", self.banner)
        assert token, self.banner
        self.token_file = token[1]
        wait_until(lambda: self.get("/ready", ok_only=False) == 200, "the cluster is ready")

    def _read_banner(self) -> str:
        """Everything up to the banner's last line. The outer pytest timeout bounds the wait."""
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if "Ctrl-C stops it" in line:
                return "".join(lines)
        raise AssertionError(f"baton serve ended with {self._process.wait()}:\n{''.join(lines)}")

    def get(self, path: str, ok_only: bool = True) -> Any:
        """JSON of a GET, or with ok_only=False the HTTP status."""
        try:
            request = urllib.request.Request(self.url + path, headers=self._headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer) if ok_only else answer.status
        except urllib.error.HTTPError as error:
            if ok_only:
                raise
            return error.code

    def post(self, path: str, body: dict[str, Any], more: Mapping[str, str] = MappingProxyType({})) -> Any:
        """JSON of a POST; an operator's command takes seconds to start, this does not."""
        headers = {**self._headers, "Content-Type": "application/json", **more}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Status by worker id, of the workers that the router is connected to."""
        views = self.get("/admin/status")["workers"]
        found = [view["status"] for view in views if view["connected"]]
        return {status["worker_id"]: status | {"generation": int(status["generation"])} for status in found}

    def wait_idle(self, num_workers: int) -> None:
        """Until all workers are there and hold no block and no transfer; says what is held otherwise."""

        def idle() -> bool:
            workers = self.workers()
            return len(workers) == num_workers and all(
                w["counters"]["held_blocks"] == 0
                and w["counters"]["running_transfers"] == 0
                and w["load"]["num_free_blocks"] == w["load"]["num_blocks"]
                for w in workers.values()
            )

        wait_until(idle, f"{num_workers} idle workers", lambda: json.dumps(self.workers(), indent=1))

    def switch_role(self, worker_id: str, role: str) -> subprocess.CompletedProcess[str]:
        """Through the command an operator types."""
        return self.baton("switch-role", worker_id, role, "--url", self.url, environment=self._environment)

    @staticmethod
    def baton(*arguments: str, environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=120,
        )

    def descendants(self) -> set[int]:
        """Process ids of the serving process and everything it started, however deep."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    continue
        found = {self._process.pid}
        while True:
            more = {pid for pid, parent in parents.items() if parent in found} - found
            if not more:
                return found
            found |= more

    def stop(self, signal_number: int = signal.SIGINT) -> int:
        """Interrupts it, as Ctrl-C does, and returns its exit code."""
        self._process.send_signal(signal_number)
        assert self._process.stdout is not None
        self._process.stdout.read()
        return self._process.wait(60)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, explain: Callable[[], str] = lambda: "") -> None:
    """Looks until it is so; what is not so after WAIT_S, which is long on the slowest host, fails and says what was waited for."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}\n{explain()}"
        time.sleep(0.05)


def pools_in_use(pids: set[int]) -> dict[int, set[int]]:
    """Inodes of the KV pools that these processes have open or mapped, and by whom.

    (Python's mmap keeps a duplicate of the descriptor, so a mapping shows as an open file.)
    """
    pools: dict[int, set[int]] = {}
    for pid in pids:
        folder = Path(f"/proc/{pid}/fd")
        try:
            for entry in os.listdir(folder):
                if "memfd:baton-kv" in os.readlink(folder / entry):
                    pools.setdefault(os.stat(folder / entry).st_ino, set()).add(pid)
        except OSError:
            continue
    return pools
