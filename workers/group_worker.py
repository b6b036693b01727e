"""A worker whose model is spread over a group of ranks; this process is rank 0 and leads. Knows no router and no Ray.

Toward routers and other workers it is one worker: one engine, one KV memory, one role. When a rank is lost it gives its
requests back, waits for a replacement, and serves again in a new generation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from workers.config import WorkerConfig
from workers.errors import RankLost
from workers.group.runner import GroupRunner
from workers.group.watch import GroupPlan, GroupWatch
from workers.kv_memory.memory import KvMemory
from workers.model.loading import ServedModel
from workers.serving.driver import RanksView
from workers.status import Role, WorkerAddress
from workers.text.tokenizer import Tokenizer
from workers.trust.credentials import Credentials
from workers.worker import LoadedModel, Worker

log = logging.getLogger(__name__)


class GroupWorker(Worker):
    """As Worker, for all ranks at once. The other ranks are workers.group.follower.Follower, elsewhere: see GroupPlan."""

    def __init__(
        self,
        config: WorkerConfig,
        worker_id: str,
        start_count: int,
        role: Role,
        on_role_change: Callable[[Role, int], None] | None = None,
        *,
        plan: GroupPlan,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(config, worker_id, start_count, role, self._role_changed, credentials=credentials)
        self._tell_role, self._plan = on_role_change, plan
        self._watch: GroupWatch | None = None
        self._group: GroupRunner | None = None
        self._switches: set[asyncio.Task[None]] = set()

    @property
    def group(self) -> GroupRunner:
        """Raises RuntimeError before `start`."""
        if self._group is None:
            raise RuntimeError("the worker has not been started")
        return self._group

    async def start(self) -> WorkerAddress:
        """As Worker.start; waits for all ranks. Its caller bounds the wait."""
        address = await super().start()
        assert self._watch is not None and self._driver is not None
        self._watch.start(self._driver)
        return address

    async def stop(self) -> None:
        """Ends the worker, then the ranks."""
        if self._watch is not None:
            self._watch.pause()
        await super().stop()
        if self._watch is not None:
            await self._watch.stop()

    async def switched(self) -> None:
        """Waits until every rank has taken, or will take when the group forms again, the role of the last switch."""
        await asyncio.gather(*self._switches)

    async def _load_model(self) -> LoadedModel:
        """The leader listens first, so that ranks load at the same time; afterwards all of them are there."""
        watch = self._watch = GroupWatch(self._config.parallel.heartbeat_timeout_s, self._plan.on_lost)
        model = await asyncio.to_thread(self._load_leader, watch)
        self.group.remember_role(self._identity.role.value, self._identity.generation)
        await watch.wait_formed(self.group)
        return model

    def _load_leader(self, watch: GroupWatch) -> ServedModel:
        config, plan = self._config, self._plan
        tokenizer = Tokenizer.load(config.model)
        self._group = GroupRunner.load(
            config,
            host=plan.host,
            port=plan.port,
            token=plan.token,
            on_listening=plan.on_listening,
            on_lost=watch.lost,
        )
        return ServedModel(self._group, tokenizer, config.served_model_name or Path(config.model).resolve().name)

    def _protect(self, memory: KvMemory) -> None:
        """Its ranks write into it as well."""

    def _ranks_view(self) -> RanksView:
        assert self._watch is not None
        return RanksView(self._watch.rank_status, self._watch.counters)

    def _role_changed(self, role: Role, generation: int) -> None:
        """On the event loop: a switch by whomever, or a new generation because a rank was lost."""
        self.group.remember_role(role.value, generation)
        if not self._identity.is_rebuilding:
            task = asyncio.get_running_loop().create_task(self._switch_ranks(role, generation))
            self._switches.add(task)
            task.add_done_callback(self._switches.discard)
        if self._tell_role is not None:
            self._tell_role(role, generation)

    async def _switch_ranks(self, role: Role, generation: int) -> None:
        """Every rank takes the role at one step boundary."""
        try:
            await asyncio.to_thread(self.group.switch_role, role.value, generation)
        except RankLost as error:
            log.warning("the group takes its role when it is whole again: %s", error)
