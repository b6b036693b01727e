"""What the controllers of Deployments and StatefulSets, and the eviction of pods, decide: which pods come and which go, from what is there now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pod_firewall import chosen

Object = dict[str, Any]


@dataclass(frozen=True)
class PodState:
    """Of a pod that is not being deleted; those that are count for nothing."""

    name: str
    hash: str
    is_ready: bool


def deployment_step(pods: Sequence[PodState], wanted: str, replicas: int, strategy: Object) -> tuple[int, list[str]]:
    """How many pods of the wanted template to make, and which to delete. `pods` are the oldest first."""
    new, old = [p for p in pods if p.hash == wanted], [p for p in pods if p.hash != wanted]
    surge = _share(strategy["maxSurge"], replicas, math.ceil)
    least_ready = replicas - _share(strategy["maxUnavailable"], replicas, math.floor)
    going = [p.name for p in _first_to_go(new)[: max(0, len(new) - replicas)]]
    spare = sum(p.is_ready for p in pods if p.name not in going) - least_ready
    room = replicas + surge - len(pods) + len(going)
    making = max(0, min(replicas - len(new), room))
    for pod in _first_to_go(old):
        if not pod.is_ready:
            going.append(pod.name)
        elif spare > 0:
            going.append(pod.name)
            spare -= 1
    return making, going


def stateful_step(
    pods: Sequence[PodState], present: set[str], base: str, wanted: str, replicas: int
) -> tuple[list[str], list[str]]:
    """Names of pods to make and to delete; one at a time, and a name comes again only when its pod is gone (`present` has those that end)."""
    names = [f"{base}-{at}" for at in range(replicas)]
    by_name = {pod.name: pod for pod in pods}
    for name in names:
        if name not in by_name:
            return ([], []) if name in present else ([name], [])
        if not by_name[name].is_ready and by_name[name].hash == wanted:
            return [], []
    above = sorted(set(by_name) - set(names))
    if above:
        return [], [above[-1]]
    for name in reversed(names):
        if by_name[name].hash != wanted:
            return [], [name]
    return [], []


def may_be_evicted(
    pod: PodState,
    labels: dict[str, str],
    budgets: Sequence[Object],
    all_pods: Sequence[tuple[PodState, dict[str, str]]],
    replicas: int,
) -> bool:
    """By the PodDisruptionBudgets that hold for it. `replicas`: what its controller wants."""
    for budget in budgets:
        if not chosen(budget["selector"], labels):
            continue
        if not pod.is_ready and budget.get("unhealthyPodEvictionPolicy") == "AlwaysAllow":
            continue
        ready = sum(each.is_ready for each, own in all_pods if chosen(budget["selector"], own))
        if ready - 1 < replicas - _share(budget["maxUnavailable"], replicas, math.ceil):
            return False
    return True


def _first_to_go(pods: Sequence[PodState]) -> list[PodState]:
    """Those that are not ready, then the youngest."""
    return sorted(reversed(pods), key=lambda pod: pod.is_ready)


def _share(value: int | str, replicas: int, rounded: Any) -> int:
    return value if isinstance(value, int) else int(rounded(replicas * int(value.removesuffix("%")) / 100))
