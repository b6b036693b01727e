"""Puts a worker together whose model is spread over a group of ranks; this process is its rank 0. Knows no router and no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from workers.config import WorkerConfig
from workers.errors import InvalidConfig, RankLost
from workers.group.runner import GroupRunner
from workers.loaded import Checkpoint
from workers.status import Role, WorkerAddress, WorkerStatus
from workers.tokenizer import Tokenizer
from workers.worker import LoadedModel, Worker

log = logging.getLogger(__name__)


class GroupWorker:
    """As workers.worker.Worker, for all ranks at once. The other ranks are workers.group.follower.Follower, elsewhere.

    `on_listening((host, port))` is called as soon as ranks may come; `on_lost(rank, reason)`, on some thread, whenever
    one is gone. Whoever hears it makes sure that the old process has ended and starts another one.
    """

    def __init__(
        self,
        config: WorkerConfig,
        worker_id: str,
        start_count: int,
        role: Role,
        *,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        on_listening: Callable[[tuple[str, int]], None],
        on_lost: Callable[[int, str], None],
        on_role_change: Callable[[Role, int], None] | None = None,
    ) -> None:
        self._token, self._host, self._port = token, host, port
        self._on_listening, self._on_lost = on_listening, on_lost
        self._group: GroupRunner | None = None
        self._on_role_change = on_role_change
        self._announcement: asyncio.Task[None] | None = None
        self._worker = Worker(config, worker_id, start_count, role, self._role_changed, self._load)

    @property
    def group(self) -> GroupRunner:
        """Raises RuntimeError before `start`."""
        if self._group is None:
            raise RuntimeError("the worker has not been started")
        return self._group

    async def start(self, join_timeout_s: float) -> WorkerAddress:
        """Starts the leader, loads rank 0, and serves once all ranks are there. Raises InvalidConfig."""
        address = await self._worker.start()
        if not await asyncio.to_thread(self.group.wait_serving, join_timeout_s):
            await self.stop()
            raise InvalidConfig(f"the ranks of the group did not all come within {join_timeout_s} s")
        status = self._worker.status()
        await self._announce(status.role, status.generation)
        return address

    async def set_role(self, role: Role) -> WorkerStatus:
        """Switches the whole group: this worker's face at once, and every rank at one step boundary under the same generation."""
        status = self._worker.set_role(role)
        if self._announcement is not None:
            await self._announcement
        return status

    def status(self) -> WorkerStatus:
        return self._worker.status()

    async def stop(self) -> None:
        """Ends the worker, then the ranks."""
        await self._worker.stop()
        if self._group is not None:
            await asyncio.to_thread(self._group.stop)

    def _role_changed(self, role: Role, generation: int) -> None:
        """On the event loop, also when a client of the gRPC face switches."""
        self._announcement = asyncio.get_running_loop().create_task(self._announce(role, generation))
        if self._on_role_change is not None:
            self._on_role_change(role, generation)

    async def _announce(self, role: Role, generation: int) -> None:
        try:
            await asyncio.to_thread(self.group.switch_role, role.value, generation)
        except RankLost as error:
            log.warning("the group takes its role when it is whole again: %s", error)

    def _load(self, config: WorkerConfig) -> LoadedModel:
        tokenizer = Tokenizer.load(config.model)
        self._group = GroupRunner.load(
            config,
            host=self._host,
            port=self._port,
            token=self._token,
            on_listening=self._on_listening,
            on_lost=self._on_lost,
        )
        name = config.served_model_name or Path(config.model).resolve().name
        return Checkpoint(self._group, tokenizer, name)
