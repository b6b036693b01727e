"""`baton serve` from start to end on this host: what the banner promises works, and a stop leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_session import processes

MODEL = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"
BOUND_S = 120.0


class Serve:
    """A `baton serve` with a temporary folder of its own, by which all its processes are found."""

    def __init__(self, *arguments: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="bt-", dir="/tmp")  # short: it ends up in the paths of sockets
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "serve", "--model", str(MODEL), "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": self.folder},
        )
        self.pid = self._process.pid
        self._watchdog = threading.Timer(BOUND_S, self._process.kill)
        self._watchdog.start()

    def read_stdout_until(self, text: str) -> str:
        return self._read(self._process.stdout, text)

    def read_stderr_until(self, text: str) -> str:
        return self._read(self._process.stderr, text)

    def members(self) -> tuple[processes.Process, ...]:
        """Everything that Ray has started for it."""
        return processes.family(f"{self.folder}/")

    def interrupt(self) -> None:
        """To the whole process group, as a terminal sends Ctrl-C."""
        os.killpg(self.pid, signal.SIGINT)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        self._process.communicate()
        return self._process.returncode

    def clean(self) -> None:
        self._watchdog.cancel()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.communicate()
        processes.end(self.members(), 0.0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, stream: object, text: str) -> str:
        read = ""
        for line in stream:  # type: ignore[attr-defined]
            read += line
            if text in line:
                return read
        raise AssertionError(f"{text!r} did not come: {read}")


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    running = Serve(*getattr(request, "param", ()))
    yield running
    running.clean()


def baton(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=BOUND_S)


def test_what_the_banner_says_works_and_a_stop_leaves_nothing(serve: Serve) -> None:
    banner = serve.read_stdout_until("Ctrl-C")
    url = re.search(r"API +(http://\S+)/v1", banner)[1]  # type: ignore[index]
    dashboard = re.search(r"Ray dashboard +(http://\S+)", banner)[1]  # type: ignore[index]

    curl = next(line.strip() for line in banner.splitlines() if line.strip().startswith("curl "))
    if shutil.which("curl"):
        answered = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=BOUND_S)
        assert json.loads(answered.stdout)["choices"][0]["message"]["role"] == "assistant", answered
        found = subprocess.run(
            ["curl", "-s", f"{dashboard}/api/v0/actors?detail=1"], capture_output=True, timeout=BOUND_S
        )
        actors = json.loads(found.stdout)["data"]["result"]["result"]
        names = {"store", "prefill-0", "decode-0", "router-0"}
        assert {actor["name"] for actor in actors} == names
        assert {actor["repr_name"] for actor in actors} == names, "the dashboard shows which is which"

    table = baton("status", "--url", url)
    assert re.search(r"decode-0 +decode +\S+Z/0 +connected", table.stdout), table
    switched = baton("switch-role", "prefill-0", "mixed", "--url", url)
    assert re.fullmatch(r"prefill-0 is mixed now, generation \S+Z/1\n", switched.stdout), switched
    serve.read_stderr_until("prefill-0 switched from prefill to mixed")
    status = json.loads(baton("status", "--json", "--url", url).stdout)
    assert {view["status"]["role"] for view in status["workers"]} == {"mixed", "decode"}
    refused = baton("switch-role", "nobody", "mixed", "--url", url)
    assert refused.returncode == 2 and "no worker 'nobody'" in refused.stderr
    spoken = baton("chat", "--url", url, "--max-tokens", "8", stdin="Hello\n/reset\nHello\n/exit\nnot read\n")
    assert spoken.returncode == 0 and spoken.stdout.count("\n") == 2, spoken

    members = serve.members()
    assert len(members) > 8
    os.kill(serve.pid, signal.SIGTERM)
    assert serve.wait() == 0
    assert processes.alive(members) == () and serve.members() == ()
    assert os.listdir(serve.folder) == [], "no file is left either"


@pytest.mark.parametrize("serve", [("--no-dashboard",)], indirect=True)
def test_a_killed_worker_is_back_by_itself(serve: Serve) -> None:
    banner = serve.read_stdout_until("Ctrl-C")
    url = re.search(r"API +(http://\S+)/v1", banner)[1]  # type: ignore[index]
    assert "dashboard" not in banner
    status = json.loads(baton("status", "--json", "--url", url).stdout)
    pids = {view["status"]["worker_id"]: view["status"]["pid"] for view in status["workers"]}
    os.kill(pids["decode-0"], signal.SIGKILL)
    # "was started again", or "is gone" and "is there" when the restart took longer than its lease.
    serve.read_stderr_until(": decode, generation ")
    members = serve.members()
    os.kill(serve.pid, signal.SIGHUP)  # as a terminal does that is closed
    assert serve.wait() == 0
    assert processes.alive(members) == () and serve.members() == ()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_ray_starts_leaves_nothing(serve: Serve, times: int) -> None:
    while not any("gcs_server" in process.command for process in serve.members()):
        assert not serve.has_ended()
    serve.interrupt()
    if times == 2:
        serve.read_stderr_until("once more to stop at once")
        serve.interrupt()
    assert serve.wait() == 130
    assert serve.members() == ()
    assert os.listdir(serve.folder) == []


@pytest.mark.parametrize("serve", [("--no-dashboard",)], indirect=True)
def test_a_second_ctrl_c_ends_a_running_cluster_at_once(serve: Serve) -> None:
    serve.read_stdout_until("Ctrl-C")
    members = serve.members()
    serve.interrupt()
    serve.read_stderr_until("once more to stop at once")
    serve.interrupt()
    assert serve.wait() in (0, 130), "130, unless the stop was done first"
    assert processes.alive(members) == () and serve.members() == ()
