"""Notices that a process of Ray's own has died: without them the actors run on, but nobody would start one that dies again."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from cluster.ray_session import processes
from workers.errors import BatonError

LOOK_S = 0.5
NAMES = {"gcs_server": "GCS", "raylet": "raylet"}
"""Programs of Ray that a cluster cannot do without, and what Ray calls them."""


class RayDied(BatonError):
    """The world's fault: Ray itself is gone, and the cluster with it. Whoever supervises `baton serve` starts it again."""

    exit_code = 3


def vital_processes(folder: str) -> dict[str, processes.Process]:
    """The processes of the Ray in `folder` that must live, by what Ray calls them. To be asked as soon as that Ray has started:
    one that has died already is not there to be found. Raises RayDied for it."""
    found = {}
    for process in processes.family(folder):
        for program, name in NAMES.items():
            if f"/{program} -" in process.command:
                found[name] = process
    for name in NAMES.values():
        if name not in found:
            raise RayDied(f"Ray's {name} has died while the cluster started, which ends with it: start it anew")
    return found


async def watch(vital: dict[str, processes.Process]) -> NoReturn:
    """Raises RayDied when one of them has died. Cancel it."""
    while True:
        await asyncio.sleep(LOOK_S)
        for name, process in vital.items():
            if not processes.alive((process,)):
                raise RayDied(
                    f"Ray's {name} (process {process.pid}) has died, so nothing here would be started again: the cluster ends; "
                    "start it anew"
                )
