"""A host whose process table is full: what needs no new thread goes on, the rest is refused for a moment, and all is well afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from workers.machine.threads import started_threads


def test_a_router_that_may_start_no_more_threads_refuses_what_needs_one_and_recovers() -> None:
    program = Path(__file__).with_name("thread_starved.py")
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    if found is None:
        pytest.skip("this host does not limit the number of processes of a user")
    assert found["starved"] == {"small": [200, None], "large": [429, "1"], "huge": [429, "1"]}
    assert "no more threads" in ended.stderr and "Traceback" not in ended.stderr
    assert found["worked"] == list(range(8)), "threads that were started before are there"
    assert {status for status, _ in found["after"].values()} == {200}


def test_a_started_pool_works_in_all_its_threads() -> None:
    with started_threads(3, "three") as pool:
        assert sorted(pool.map(abs, (-1, -2, -3, -4))) == [1, 2, 3, 4]
