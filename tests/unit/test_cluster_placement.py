"""Which resources the ranks of a worker ask for, where they go, and how it is said that they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.actors.placement import bundle_order, rank_bundles, rank_name, what_is_missing
from cluster.config import ClusterConfig, load_config
from cluster.console.output import status_table
from cluster.lifecycle import preflight
from cluster.preflight import check_layout, weight_bytes
from workers.errors import InvalidConfig

MODEL = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"


def config(*assignments: str) -> ClusterConfig:
    return load_config(None, {"worker.model": str(MODEL)}, assignments)


def test_each_rank_gets_a_bundle_and_on_gpus_a_gpu() -> None:
    four = "worker.parallel.expert_parallel=4"
    assert rank_bundles(config(four)) == [{"CPU": 0.01}] * 4
    assert rank_bundles(config(four, "ray.actor_cpus=0"))[0]["CPU"] > 0, "Ray takes no empty bundle"
    on_gpus = rank_bundles(config(four, "worker.device=cuda", "ray.worker_gpus=0.5"), "10.0.0.7")
    assert on_gpus[1:] == [{"CPU": 0.01, "GPU": 0.5}] * 3
    assert on_gpus[0]["node:10.0.0.7"] > 0, "the leader is bound to the host that asked for it"
    assert [rank_name("decode-1", rank) for rank in (0, 3)] == ["decode-1", "decode-1/rank-3"]


def test_ranks_of_a_node_follow_one_another_from_the_leaders_on() -> None:
    assert bundle_order(["b", "a", "b", "a"]) == [0, 2, 1, 3]
    assert bundle_order(["a"] * 3) == [0, 1, 2]


def test_what_is_missing_is_said_in_figures() -> None:
    said = what_is_missing(
        "decode-0", [{"CPU": 1, "GPU": 1}] * 4, "pack", {"CPU": 7.5}, {"CPU": 8, "GPU": 2, "node:10.0.0.7": 1}
    )
    assert said == (
        "Ray has no room for the 4 ranks of decode-0: they need 4 GPU (0 of 2 free), 4 CPU (7.5 of 8 free) on 1 node, "
        "placed pack; add nodes to Ray, or lower worker.parallel or ray.worker_gpus"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["worker.parallel.expert_parallel=3"], "do not spread evenly over 3 ranks"),
        (["worker.parallel.tensor_parallel=2"], "must divide expert_parallel"),
        (["worker.parallel.expert_parallel=2", "worker.device=cuda:1"], "Ray shows each rank a GPU of its own"),
        (["worker.parallel.expert_parallel=2", "worker.device=cuda", "ray.worker_gpus=0.5"], "which NCCL refuses"),
    ],
)
async def test_a_layout_that_cannot_be_is_refused_before_anything_starts(settings: list[str], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        await preflight(config(*settings))


def test_a_placement_that_ray_does_not_know_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="'pack' or 'spread'"):
        config("ray.rank_placement=diagonal")


def test_what_every_rank_needs_is_counted_once_a_rank() -> None:
    alone = weight_bytes(config().worker)
    pair = weight_bytes(config("worker.parallel.expert_parallel=2").worker)
    sharded = weight_bytes(config("worker.parallel.expert_parallel=2", "worker.parallel.tensor_parallel=2").worker)
    assert alone == sharded < pair < 2 * alone, "experts are there once, attention once a pool"
    check_layout(config("worker.parallel.expert_parallel=2", "worker.parallel.tensor_parallel=2").worker)


def test_the_table_of_workers_shows_their_ranks() -> None:
    rank = {"rank": 0, "host": "a", "pid": 11, "epoch": 3, "is_alive": True, "shares_memory": True}
    lost = {**rank, "rank": 1, "host": "b", "pid": 12, "epoch": 0, "is_alive": False, "shares_memory": False}
    load = {"num_running": 0, "num_waiting": 0, "num_blocks": 8, "num_free_blocks": 8}
    status = {"worker_id": "decode-0", "role": "decode", "generation": (2 << 32) + 1, "load": load}
    view = {"connected": True, "num_requests": 0, "frame_age_s": 0.1}
    view["status"] = {**status, "is_rebuilding": True, "ranks": [rank, lost], "counters": {"expert_imbalance": 1.25}}
    shown = status_table(json.loads(json.dumps({"num_running": 0, "num_waiting": 0, "workers": [view]})))
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert rows["decode-0"][2:4] == ["1970-01-01T00:00:02Z/1", "rebuilding"]
    assert rows["decode-0/rank-0"][1:] == ["a:11", "alive", "3", "leader's", "1.25"]
    assert rows["decode-0/rank-1"][1:] == ["b:12", "lost", "-", "own"]
