"""Decides which bundles of resources a worker's ranks ask Ray for and which rank gets which; says in figures what is missing. Pure: knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.config import ClusterConfig
from workers.errors import BatonError

MIN_CPUS = 0.001
"""Ray takes no empty bundle."""
PIN = 0.001
"""Share of a node's own resource (`node:ADDRESS`) that binds a bundle to that node."""

Bundle = dict[str, float]


class NoRoom(BatonError):
    """The world's fault: Ray has not the resources that a worker's ranks need."""


def rank_name(worker_id: str, rank: int) -> str:
    """The Ray actor's name: the leader goes by the worker's."""
    return f"{worker_id}/rank-{rank}" if rank else worker_id


def rank_bundles(config: ClusterConfig, leader_node: str = "") -> list[Bundle]:
    """One bundle for each rank, rank 0's first, which `leader_node` (an address) binds to a node."""
    each: Bundle = {"CPU": max(config.ray.actor_cpus, MIN_CPUS)}
    if config.worker.device != "cpu":
        each["GPU"] = config.ray.worker_gpus
    bundles = [dict(each) for _ in range(config.worker.parallel.size)]
    if leader_node:
        bundles[0][f"node:{leader_node}"] = PIN
    return bundles


def bundle_order(node_of_bundle: Sequence[str]) -> list[int]:
    """Which bundle each rank takes: rank 0 the first, and ranks of one node follow one another, as tensor-parallel ones should."""
    nodes = list(dict.fromkeys(node_of_bundle))
    return sorted(range(len(node_of_bundle)), key=lambda at: (nodes.index(node_of_bundle[at]), at))


def what_is_missing(
    worker_id: str, bundles: Sequence[Bundle], strategy: str, free: Mapping[str, float], total: Mapping[str, float]
) -> str:
    """One sentence with figures for a placement group that Ray could not place."""
    needed = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}
    have = ", ".join(
        f"{_number(needed[name])} {name} ({_number(free.get(name, 0.0))} of {_number(total.get(name, 0.0))} free)"
        for name in ("GPU", "CPU")
        if needed[name]
    )
    nodes = sum(name.startswith("node:") and name != "node:__internal_head__" for name in total)
    return (
        f"Ray has no room for the {len(bundles)} ranks of {worker_id}: they need {have} on {nodes} node"
        f"{'s' if nodes != 1 else ''}, placed {strategy}; add nodes to Ray, or lower worker.parallel or ray.worker_gpus"
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
