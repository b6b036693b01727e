"""The Ray actor of a worker's further ranks: it finds the leader by name, and follows it for as long as there is one."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from cluster.actors.placement import rank_name
from cluster.actors.process import Actor, leave_for_good
from cluster.config import LogConfig
from workers.config import WorkerConfig
from workers.errors import BatonError
from workers.machine.collector import leave_what_is_there
from workers.status import RankStatus

log = logging.getLogger(__name__)

ASK_AGAIN_S = 0.5
"""A leader that does not answer, because its process is being started, is asked again this much later."""
REJOIN_GRACE_S = 1.5
"""A rank that was lost and lives, as one whose connection broke, may come back with its weights; later its process is ended."""
ANSWER_TIMEOUT_S = 10.0
"""Then the actor is looked up anew: its name may belong to another start by now."""


class LeaderGone(BatonError):
    """The world's fault: no leader came back in time."""


class RankActor(Actor):
    """Rank 1 or higher under a name such as `decode-0/rank-1`. Ray starts it again when it dies; it loads its share anew.

    It outlives its leader: it keeps its weights for `leader_timeout_s`, for the leader's next start.
    """

    vital_thread = ("group",)

    def __init__(
        self,
        worker_id: str,
        rank: int,
        config: WorkerConfig,
        namespace: str,
        secret: str,
        leader_timeout_s: float,
        log_config: LogConfig | None = None,
    ) -> None:
        self._worker_id, self._rank, self._config = worker_id, rank, config
        self._namespace, self._secret, self._leader_timeout_s = namespace, secret, leader_timeout_s
        self._follower: Any = None
        self._loop = asyncio.get_running_loop()
        super().__init__(rank_name(worker_id, rank), log_config)

    async def stop(self) -> None:
        """Ends the rank's part in the group; the process stays for Ray to end."""
        await self._end()
        if self._follower is not None:
            self._follower.stop()

    async def _run(self) -> None:
        make = await asyncio.to_thread(_import_follower)
        self._follower = make(self._config, self._rank, self._secret, self._on_loaded)
        while True:
            host, port = await self._find_leader()
            why = await asyncio.to_thread(self._follower.serve, host, port)
            log.info("%s: %s", self._name, why)
            await asyncio.sleep(ASK_AGAIN_S)

    def _on_loaded(self) -> None:
        """Called on the thread that serves."""
        self._loop.call_soon_threadsafe(self._tell_started)

    def _tell_started(self) -> None:
        if not self._started.done():
            leave_what_is_there()
            self._started.set_result(self._name)

    async def _find_leader(self) -> tuple[str, int]:
        """Where the leader listens now. Raises LeaderGone; leaves for good when the leader was removed."""
        import ray
        from ray.exceptions import ActorDiedError, RayError

        began_s = time.monotonic()
        while True:
            try:
                leader = ray.get_actor(self._worker_id, namespace=self._namespace)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    host, port = await leader.group_address.remote()
                return str(host), int(port)
            except (ActorDiedError, ValueError):
                if self._started.done():
                    leave_for_good()
            except (RayError, TimeoutError) as error:
                log.info("%s waits for its leader: %s", self._name, type(error).__name__)
            if self._started.done() and time.monotonic() - began_s > self._leader_timeout_s:
                raise LeaderGone(f"{self._worker_id} has not come back within {self._leader_timeout_s:g} s")
            await asyncio.sleep(ASK_AGAIN_S)


def end_rank(rank: RankStatus) -> None:
    """Sees that a lost rank's process ends, wherever it is, so that Ray starts another. One that is gone is left alone.

    By its process id, not by the actor's name: that may be a newer process already, which must not be ended.
    """
    if not rank.pid:
        return
    if rank.host == socket.gethostname():
        kill_rank_process(rank.pid)
        return
    ray: Any = importlib.import_module("ray")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerHostname"] == rank.host:
            at_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(kill_rank_process).options(num_cpus=0, scheduling_strategy=at_node, max_retries=0)
            ray.get(task.remote(rank.pid), timeout=30.0)
            return


def kill_rank_process(pid: int) -> bool:
    """SIGKILL, as a stopped process hears nothing else; only to a process that Ray runs as an actor."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if not command.startswith(b"ray::"):
            return False
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True


def _import_follower() -> Any:
    """On a thread, as it loads torch: the actor answers meanwhile."""
    return importlib.import_module("workers.group.follower").Follower
