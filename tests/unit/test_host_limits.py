"""Limits of containers, read from copies of what kernels write: control groups of version 1 and 2, nested, hidden, unlimited."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from workers.machine.limits import available_bytes, memory_kills, usable_cpus
from workers.machine.pressure import LOOK_S, MemoryWatch

GIB = 2**30


def host(root: Path, files: dict[str, str], groups: str, available_kib: int = 64 * 2**20) -> Path:
    written = {
        "proc/meminfo": f"MemTotal: 999999999 kB\nMemAvailable:   {available_kib} kB\n",
        "proc/self/cgroup": groups,
    }
    for name, text in (written | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(folder: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file 7\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(used), f"{folder}/memory.stat": stat}


def v1(folder: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}\n"
    return {
        f"{folder}/memory.limit_in_bytes": str(limit),
        f"{folder}/memory.usage_in_bytes": str(used),
        f"{folder}/memory.stat": stat,
    }


TOP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ({}, "0::/\n", 64 * GIB),
        (v2(TOP, "max\n", GIB), "0::/\n", 64 * GIB),
        (v2(TOP, str(8 * GIB), 3 * GIB, inactive=GIB), "0::/\n", 6 * GIB),
        # a pod's own group has no limit; the one above has
        (v2(f"{TOP}/pod/box", "max", GIB) | v2(f"{TOP}/pod", str(4 * GIB), GIB), "0::/pod/box\n", 3 * GIB),
        # the path is the host's, the file system shows the own group at the top
        (v2(TOP, str(2 * GIB), GIB), "0::/kubepods/pod1/box\n", GIB),
        (v1(f"{TOP}/memory", 8 * GIB, 3 * GIB, inactive=GIB), "4:memory:/\n0::/\n", 6 * GIB),
        (v1(f"{TOP}/memory/docker/x", 2**63 - 4096, GIB), "4:memory:/docker/x\n", 64 * GIB),
        (v1(f"{TOP}/memory", 2 * GIB, GIB), "4:memory:/docker/x\n1:cpu,cpuacct:/\n", GIB),
        (v2(f"{TOP}/unified", str(2 * GIB), GIB), "1:name=systemd:/\n0::/\n", GIB),
        (v2(TOP, str(GIB), 2 * GIB), "0::/\n", 0),
    ],
)
def test_memory_is_what_the_kernel_and_every_group_above_leave(
    tmp_path: Path, files: dict[str, str], groups: str, expected: int
) -> None:
    assert available_bytes(host(tmp_path, files, groups)) == expected


def test_a_host_without_groups_has_what_the_kernel_says(tmp_path: Path) -> None:
    root = host(tmp_path, {}, "", available_kib=5)
    assert available_bytes(root) == 5 * 1024
    (root / "proc/self/cgroup").unlink()
    assert available_bytes(root) == 5 * 1024
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("files", "groups", "at_most"),
    [
        ({f"{TOP}/cpu.max": "max 100000\n"}, "0::/\n", 10**6),
        ({f"{TOP}/cpu.max": "50000 100000\n"}, "0::/\n", 1),
        ({f"{TOP}/a/cpu.max": "max 100000\n", f"{TOP}/cpu.max": "100000 100000\n"}, "0::/a\n", 1),
        (
            {f"{TOP}/cpu,cpuacct/cpu.cfs_quota_us": "100000", f"{TOP}/cpu,cpuacct/cpu.cfs_period_us": "100000"},
            "2:cpu,cpuacct:/\n",
            1,
        ),
        ({f"{TOP}/cpu/cpu.cfs_quota_us": "-1", f"{TOP}/cpu/cpu.cfs_period_us": "100000"}, "2:cpu:/\n", 10**6),
    ],
)
def test_processors_are_those_allowed_or_a_groups_quota(
    tmp_path: Path, files: dict[str, str], groups: str, at_most: int
) -> None:
    assert usable_cpus(host(tmp_path, files, groups)) == min(len(os.sched_getaffinity(0)), at_most)


def test_kills_for_want_of_memory_are_the_groups_or_else_the_hosts(tmp_path: Path) -> None:
    vmstat = {"proc/vmstat": "nr_free_pages 5\noom_kill 7\n"}
    assert memory_kills(host(tmp_path / "bare", vmstat, "0::/\n")) == 7
    second = vmstat | {f"{TOP}/memory.events": "low 0\nmax 3\noom 2\noom_kill 2\n"}
    assert memory_kills(host(tmp_path / "second", second, "0::/\n")) == 2
    first = vmstat | {f"{TOP}/memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"}
    assert memory_kills(host(tmp_path / "first", first, "4:memory:/a\n")) == 1
    assert memory_kills(tmp_path / "nothing") == 0


@pytest.mark.parametrize("kind", ["version 2", "version 1", "nested"])
def test_memory_that_runs_short_is_named_and_enough_of_it_is_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    now = 0.0

    def uses(used: int) -> bool:
        """Whether it is short, a second later."""
        nonlocal now
        now += LOOK_S
        if kind == "version 1":
            host(tmp_path, v1(f"{TOP}/memory/a", 8 * GIB, used), "4:memory:/a\n")
        elif kind == "version 2":
            host(tmp_path, v2(TOP, str(8 * GIB), used), "0::/\n")
        else:
            above = v2(f"{TOP}/pod", str(8 * GIB), used)
            host(tmp_path, v2(f"{TOP}/pod/box", "max", GIB) | above, "0::/pod/box\n")
        return watch.is_short

    watch = MemoryWatch("less is done", 2 * GIB, lambda: available_bytes(tmp_path), lambda: now)
    assert [uses(used * GIB) for used in (1, 6, 7, 6, 5, 1, 7)] == [False, False, True, True, False, False, True]
    assert [record.getMessage() for record in caplog.records] == [
        "memory is short (1024 MiB available): less is done",
        "there is enough memory again (3072 MiB available)",
        "memory is short (1024 MiB available): less is done",
    ]
    now += LOOK_S / 2
    host(tmp_path, v2(TOP, str(8 * GIB), 0), "0::/\n")
    assert watch.is_short, "the kernel is asked once a second"


def test_a_process_opens_as_many_files_as_it_may() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = (
        "import resource; from workers.machine.limits import raise_file_limit;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard})); print(raise_file_limit())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == f"{hard}\n", run


@pytest.fixture
def bounded_group() -> Iterator[Path]:
    """A real control group, in another one that may use 450 MiB; skips where this machine lets nobody make one."""
    for top, limit in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        outer = top / f"baton-test-{os.getpid()}"
        inner = outer / "box"
        try:
            if not (top / "cgroup.procs").exists():
                continue
            inner.mkdir(parents=True)
            (outer / limit).write_text(str(450 << 20))
            (inner / "cgroup.procs").touch()
            yield inner
            return
        except OSError:
            continue
        finally:
            for folder in (inner, outer):
                with suppress(OSError):
                    folder.rmdir()
    pytest.skip("no control group with a limit of memory can be made here")


def test_in_a_real_group_memory_that_runs_short_is_named_and_enough_of_it_is_too(bounded_group: Path) -> None:
    program = Path(__file__).with_name("memory_bound.py")
    ended = subprocess.run(
        [sys.executable, str(program), str(bounded_group)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    available_mib, seen = json.loads(ended.stdout)
    assert 380 < available_mib <= 450, "what the group above leaves, not what the host has"
    assert seen == [False, True, False]
    assert "memory is short" in ended.stderr and "there is enough memory again" in ended.stderr
