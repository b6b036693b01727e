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
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_listens

from cluster.ray_session import processes

MODEL = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"
BOUND_S = 480.0
"""For a hang. A slow host takes minutes for what takes 15 s elsewhere."""
pytestmark = pytest.mark.timeout(600)


def own_disk(folder: str, num_bytes: int) -> tuple[str, ...]:
    """The beginning of a command that runs with a new disk at `folder`."""
    script = f'mount -t tmpfs -o size={num_bytes},mode=700 none "$0" && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, folder)


def heed_hangups() -> None:
    """In the new process, whatever the tests run under: `nohup` has SIGHUP ignored, which `baton serve` would keep to."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Serve:
    """A `baton serve` with a temporary folder of its own, by which all its processes are found."""

    def __init__(self, *arguments: str, disk_bytes: int = 0) -> None:
        """`disk_bytes`: the folder is a disk of that size, which these processes alone see (`inside` is the way to it)."""
        self.folder = tempfile.mkdtemp(prefix="bt-", dir="/tmp")  # short: it ends up in the paths of sockets
        self.environment = {**os.environ, "TMPDIR": self.folder, "XDG_STATE_HOME": f"{self.folder}/state"}
        self._process = subprocess.Popen(
            [
                *(own_disk(self.folder, disk_bytes) if disk_bytes else ()),
                *(sys.executable, "-m", "cluster.cli", "serve", "--model", str(MODEL), "--port", "0"),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=self.environment,
            preexec_fn=heed_hangups,
        )
        self.pid = self._process.pid
        self._watchdog = threading.Timer(BOUND_S, self._process.kill)
        self._watchdog.start()

    @property
    def inside(self) -> Path:
        """The folder as its processes see it."""
        return Path(f"/proc/{self.pid}/root{self.folder}")

    def read_stdout_until(self, text: str) -> str:
        return self._read(self._process.stdout, text)

    def read_stderr_until(self, text: str) -> str:
        return self._read(self._process.stderr, text)

    def members(self) -> tuple[processes.Process, ...]:
        """Everything that Ray has started for it."""
        return processes.family(f"{self.folder}/")

    def wait_until_gone(self, members: tuple[processes.Process, ...]) -> None:
        """Until none of them runs and no file is left; the limit is for a hang."""
        deadline = time.monotonic() + BOUND_S
        while processes.alive(members) or self.members() or os.listdir(self.folder):
            assert time.monotonic() < deadline, (processes.alive(members), os.listdir(self.folder))
            time.sleep(0.05)

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
        self._process.kill()
        left = self._process.communicate()
        raise AssertionError(f"{text!r} did not come: {read}; exit code {self._process.returncode}; {left}")


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    running = Serve(*getattr(request, "param", ()))
    yield running
    running.clean()


of_one_worker = pytest.mark.parametrize(
    "serve", [("--mixed", "1", "--prefill", "0", "--decode", "0")], indirect=True, ids=[""]
)
"""For what is said of a cluster's processes, whatever each does: it starts sooner."""


def baton(
    *arguments: str, stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=BOUND_S, env=environment)


@pytest.mark.parametrize("serve", [("--dashboard",)], indirect=True)
def test_what_the_banner_says_works_and_a_stop_leaves_nothing(serve: Serve) -> None:
    banner = serve.read_stdout_until("Ctrl-C")
    token = Path(re.search(r"Ray's token +in (\S+)", banner)[1]).read_text()  # type: ignore[index]
    url = re.search(r"API +(http://\S+)/v1", banner)[1]  # type: ignore[index]
    dashboard = re.search(r"Ray dashboard +(http://\S+)", banner)[1]  # type: ignore[index]

    curl = next(line.strip() for line in banner.splitlines() if line.strip().startswith("curl "))
    if shutil.which("curl"):
        answered = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=BOUND_S)
        assert json.loads(answered.stdout)["choices"][0]["message"]["role"] == "assistant", answered
        page = ["curl", "-s", f"{dashboard}/api/v0/actors?detail=1"]
        stranger = subprocess.run(page, capture_output=True, timeout=BOUND_S)
        assert b"Unauthorized" in stranger.stdout
        found = subprocess.run([*page, "-H", f"Authorization: Bearer {token}"], capture_output=True, timeout=BOUND_S)
        actors = json.loads(found.stdout)["data"]["result"]["result"]
        names = {"store", "prefill-0", "decode-0", "router-0"}
        assert {actor["name"] for actor in actors} == names
        assert {actor["repr_name"] for actor in actors} == names, "the dashboard shows which is which"
        # Its timeline has what loading was, and no calls that are made again and again, such as those of the store's leases.
        tasks, asking = (
            set[str](),
            ["curl", "-s", f"{dashboard}/api/v0/tasks?limit=10000", "-H", f"Authorization: Bearer {token}"],
        )
        deadline = time.monotonic() + BOUND_S
        while not {"WorkerActor.ready", "RouterActor.ready"} <= tasks:
            assert time.monotonic() < deadline, tasks
            told = json.loads(subprocess.run(asking, capture_output=True, timeout=BOUND_S).stdout)
            tasks = {task["func_or_class_name"] for task in told["data"]["result"]["result"]}
        assert not {name for name in tasks if name.startswith("StoreHost.") and name != "StoreHost.__init__"}, tasks
        assert not any(name.endswith((".loading", ".pid")) for name in tasks), tasks

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


@pytest.mark.parametrize("serve", [("--set", "tls.mode=off")], indirect=True)
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
        time.sleep(0.02)  # looking takes the processor that Ray is to start on
    serve.interrupt()
    if times == 2:
        serve.read_stderr_until("once more to stop at once")
        serve.interrupt()
    assert serve.wait() == 130
    assert serve.members() == ()
    assert os.listdir(serve.folder) == []


@of_one_worker
def test_a_second_ctrl_c_ends_a_running_cluster_at_once(serve: Serve) -> None:
    serve.read_stdout_until("Ctrl-C")
    members = serve.members()
    serve.interrupt()
    serve.read_stderr_until("once more to stop at once")
    serve.interrupt()
    assert serve.wait() in (0, 130), "130, unless the stop was done first"
    assert processes.alive(members) == () and serve.members() == ()


@of_one_worker
def test_a_killed_serve_leaves_neither_processes_nor_files(serve: Serve) -> None:
    serve.read_stdout_until("Ctrl-C")
    members = serve.members()
    assert {Path(serve.folder, name).stat().st_mode & 0o077 for name in os.listdir(serve.folder)} == {0}
    os.kill(serve.pid, signal.SIGKILL)
    serve.wait_until_gone(members)


@of_one_worker
@pytest.mark.parametrize(
    ("program", "name", "while_it"),
    [("gcs_server", "GCS", "starts"), ("raylet", "raylet", "starts"), ("raylet", "raylet", "serves")],
)
def test_the_death_of_rays_own_processes_is_said_and_ends_the_cluster(
    serve: Serve, program: str, name: str, while_it: str
) -> None:
    """(A GCS that dies while a cluster serves: below, detached.)"""
    if while_it == "starts":
        serve.read_stderr_until("starting Ray")  # done, by the time it is said
    else:
        serve.read_stdout_until("Ctrl-C")
    members = serve.members()
    (victim,) = [each for each in members if f"/{program} -" in each.command]
    os.kill(victim.pid, signal.SIGKILL)
    said = serve.read_stderr_until(" has died")
    assert f"Ray's {name} " in said and "Traceback" not in said
    assert serve.wait() == 3
    assert processes.alive(members) == () and serve.members() == () and os.listdir(serve.folder) == []


def may_mount() -> bool:
    tried = subprocess.run([*own_disk("/mnt", 1 << 20), "true"], capture_output=True, timeout=BOUND_S)
    return tried.returncode == 0


@pytest.mark.skipif(shutil.which("unshare") is None or not may_mount(), reason="this user may make no disks")
def test_a_full_disk_costs_logs_and_no_answer_and_is_said() -> None:
    serve = Serve(disk_bytes=96 << 20)
    try:
        banner = serve.read_stdout_until("Ctrl-C")
        url = re.search(r"API +(http://\S+)/v1", banner)[1]  # type: ignore[index]

        def ask() -> str:
            body = b'{"prompt": "Hello", "max_tokens": 8, "temperature": 0}'
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=BOUND_S) as answer:
                return str(json.loads(answer.read())["choices"][0]["text"])

        golden = ask()
        filler = serve.inside / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        serve.read_stderr_until("is full")
        assert os.statvfs(serve.inside).f_bavail == 0
        status = json.loads(baton("status", "--json", "--url", url).stdout)
        pids = {view["status"]["worker_id"]: view["status"]["pid"] for view in status["workers"]}
        assert [ask() for _ in range(3)] == [golden] * 3
        os.kill(pids["decode-0"], signal.SIGKILL)  # Ray starts no process without room for its logs
        filler.unlink()
        serve.read_stderr_until("has room again")
        assert ask() == golden
        members = serve.members()
        os.kill(serve.pid, signal.SIGTERM)
        assert serve.wait() == 0 and processes.alive(members) == ()
    finally:
        serve.clean()


@pytest.mark.parametrize("serve", [("--detach",)], indirect=True)
def test_a_detached_cluster_whose_ray_dies_says_so_in_its_log_and_is_gone(serve: Serve) -> None:
    banner = serve.read_stdout_until("`baton stop` stops it")
    assert serve.wait() == 0
    log = Path(re.search(r"is in (\S+)\.\n", banner)[1])  # type: ignore[index]
    members = serve.members()
    (victim,) = [each for each in members if "/gcs_server -" in each.command]
    os.kill(victim.pid, signal.SIGKILL)
    deadline = time.monotonic() + BOUND_S
    while f"Ray's GCS (process {victim.pid}) has died" not in log.read_text():  # the last that it says
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    assert processes.alive(members) == () and os.listdir(serve.folder) == ["state"]
    none = baton("stop", environment=serve.environment)
    assert none.returncode == 2 and "no cluster of this user" in none.stderr


@pytest.mark.parametrize("serve", [("--detach",)], indirect=True)
def test_a_detached_cluster_outlives_its_command_and_is_found_and_stopped(serve: Serve) -> None:
    banner = serve.read_stdout_until("`baton stop` stops it")
    assert serve.wait() == 0
    members = serve.members()
    assert len(members) > 5
    table = baton("status", environment=serve.environment)
    assert re.search(r"decode-0 +decode", table.stdout), table

    url = re.search(r"API +(http://\S+)/v1", banner)[1]  # type: ignore[index]
    port = int(url.rpartition(":")[2])
    (router,) = [each for each in members if ("127.0.0.1", port) in ray_listens.sockets([each])]
    os.kill(router.pid, signal.SIGKILL)
    # Sent while nobody is there to accept it, and once: it waits for the next router, which waits for its workers.
    killed_at = time.monotonic()
    request = urllib.request.Request(
        f"{url}/v1/completions", b'{"prompt": "Hello", "max_tokens": 4}', {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=BOUND_S) as answer:
        assert answer.status == 200
    print(f"answered {time.monotonic() - killed_at:.2f} s after the router was killed")

    log = Path(re.search(r"is in (\S+)\.\n", banner)[1])  # type: ignore[index]
    assert log.stat().st_mode & 0o077 == 0
    stopped = baton("stop", environment=serve.environment)
    assert stopped.returncode == 0 and stopped.stdout.startswith("stopped http://"), stopped
    assert processes.alive(members) == () and os.listdir(serve.folder) == ["state"]
    assert "stopping" in log.read_text()
    none = baton("stop", environment=serve.environment)
    assert none.returncode == 2 and "no cluster of this user" in none.stderr


def test_a_detached_start_that_fails_ends_with_its_own_code() -> None:
    refused = baton("serve", "--detach", "--model", "/nowhere")
    assert refused.returncode == 2 and "cannot find the model" in refused.stderr
