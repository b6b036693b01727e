"""A worker computes on the processors that it was given, and nothing else of the process moves there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, PoolsConfig
from cluster.preflight import check_processors
from router.config import RouterConfig
from tests.unit.model_configs import SHIPPED, load, logits, prefill
from tests.unit.test_model_native import needs_compiler
from workers.config import ParallelConfig, WorkerConfig
from workers.errors import InvalidConfig
from workers.machine.processors import Processors, parse, read_nodes, too_few
from workers.model.native.ernie import NativeErnie

NODES = {0: frozenset({0, 1, 4}), 1: frozenset({2, 3})}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", {3}),
        ("0-2", {0, 1, 2}),
        ("0-1, 8,10-11", {0, 1, 8, 10, 11}),
        ("numa:1", {2, 3}),
        ("numa:1,0", {0, 2, 3}),
    ],
)
def test_processors_are_numbers_ranges_and_nodes(text: str, expected: set[int]) -> None:
    assert parse(text, NODES) == expected


@pytest.mark.parametrize("text", [",", "a", "-1", "3-1", "1-", "numa:", "numa:x", "0;1", "1.5", "numa:7", "9999999"])
def test_what_is_no_list_of_processors_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfig, match=r"worker\.cpus"):
        parse(text, NODES)


def test_processors_that_this_process_may_not_use_are_named() -> None:
    allowed = os.sched_getaffinity(0)
    with pytest.raises(InvalidConfig, match="names processors 4095; this process may use"):
        Processors.of(f"{min(allowed)},4095")


def test_nodes_are_read_from_the_system(tmp_path: Path) -> None:
    for name, members in (("node0", "0-1,4\n"), ("node1", "2-3\n"), ("node2", "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(members)
    (tmp_path / "online").write_text("0-2\n")
    assert read_nodes(tmp_path) == NODES


def test_work_runs_on_the_given_processors_and_the_caller_stays_where_it_is() -> None:
    before = os.sched_getaffinity(0)
    given = Processors.of(str(max(before)))
    assert given.run(lambda: os.sched_getaffinity(0)) == {max(before)}
    assert os.sched_getaffinity(0) == before
    assert Processors.of("").run(threading.get_ident) == threading.get_ident()


def test_more_threads_than_processors_are_a_warning() -> None:
    assert "will wait for each other" in too_few(3, Processors(frozenset({0, 1})))
    assert too_few(2, Processors(frozenset({0, 1}))) == ""


@needs_compiler
def test_helpers_and_steps_run_on_the_workers_processors_and_its_pool_is_bound_to_their_node() -> None:
    cpu = max(os.sched_getaffinity(0))
    before = _places()
    runner = load(SHIPPED, cpus=str(cpu), num_threads=3)
    assert isinstance(runner.model, NativeErnie)
    assert runner.warnings == (
        "worker.num_threads is 3 and the worker may use 1 processors: threads will wait for each other",
    )
    started = {task: place for task, place in _places().items() if task not in before}
    assert list(started.values()).count(str(cpu)) >= 2

    seen: list[set[int]] = []

    def step() -> None:
        logits(runner, prefill([5, 6, 7]))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert seen == [{cpu}]
    node = next((node for node, members in read_nodes().items() if cpu in members), None)
    maps = Path("/proc/self/numa_maps")
    if node is not None and maps.exists():
        first_page = runner.kv_memory.bytes.ctypes.data
        assert f"{first_page:08x} prefer:{node} " in maps.read_text()


def _places() -> dict[str, str]:
    """Where each thread of this process may run."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            status = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # another test's thread, which has just ended
            continue
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        found[task.name] = lines["Cpus_allowed_list"]
    return found


def cluster_config(**pools: object) -> ClusterConfig:
    return ClusterConfig(
        worker=WorkerConfig(model="m", cpus="0"),
        router=RouterConfig(model="m"),
        pools=PoolsConfig(**pools),  # type: ignore[arg-type]
    )


def test_each_worker_of_a_host_can_have_its_own_processors() -> None:
    config = cluster_config(prefill=1, decode=2, cpu_sets=("0", "1-2", "numa:1"))
    names = [name for name, _ in config.pools.workers]
    assert [config.worker_named(name).cpus for name in names] == ["0", "1-2", "numa:1"]
    assert config.worker_named("joined-later").cpus == "0"
    assert cluster_config(prefill=1, decode=1).worker_named("decode-0").cpus == "0"


def test_processors_that_cannot_be_given_are_refused_before_anything_starts() -> None:
    with pytest.raises(InvalidConfig, match="an entry for each of the 2 workers; it has 1"):
        cluster_config(prefill=1, decode=1, cpu_sets=("0",))
    with pytest.raises(InvalidConfig, match="4095"):
        check_processors(cluster_config(prefill=1, decode=1, cpu_sets=("0", "4095")))
    with pytest.raises(InvalidConfig, match=r"worker.cpus must be empty for a group"):
        WorkerConfig(model="m", cpus="0", parallel=ParallelConfig(expert_parallel=2))
