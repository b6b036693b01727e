"""Runs jobs that no client waits for to their end. Workers own them: a router that dies takes none with it, but no longer runs them again elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from starlette.types import Scope

from router.api.asking import Inquiry
from router.api.callers import Account, caller_of
from router.api.job_outputs import JobOutputs
from router.api.job_progress import JobProgress
from router.api.problems import Problem, describe
from workers.errors import BatonError, Refusal, Refused

if TYPE_CHECKING:
    from router.api.services import Services

_log = logging.getLogger(__name__)

TENANTS_SHARES = 4
"""So many tenants may have all that one may have."""


@dataclass(slots=True)
class _Running:
    tenant: str
    is_forgotten: bool = False
    """Nobody wants to know what becomes of it."""
    task: asyncio.Task[None] | None = None


class BackgroundJobs:
    """At most `services.config.max_background` of each tenant at once, and TENANTS_SHARES times that in all. `on_end` is told what came of each; a Problem: it has failed. Used
    by one event loop."""

    def __init__(self, services: Services, on_end: Callable[[Inquiry, JobProgress, Problem | None], None]) -> None:
        self._services = services
        self._on_end = on_end
        self._running: dict[str, _Running] = {}

    def is_running(self, job_id: str) -> bool:
        return job_id in self._running

    def forget(self, job_id: str) -> None:
        """Whatever comes of it is told to nobody."""
        if job_id in self._running:
            self._running[job_id].is_forgotten = True

    async def begin(self, asked: Inquiry, scope: Scope) -> None:
        """Submits a job and returns. Raises Refused, InvalidRequest, Rejected."""
        tenant, job_id = caller_of(scope).tenant, asked.job.job_id
        if job_id in self._running:
            return
        num_running = sum(each.tenant == tenant for each in self._running.values())
        most = self._services.config.max_background
        if num_running >= most or len(self._running) >= TENANTS_SHARES * most:
            raise Refused(Refusal.QUEUE_FULL, "too many responses run in the background here", 1.0)
        running = self._running[job_id] = _Running(tenant)  # before anything is waited for
        try:
            requests, parts = asked.requests(None)
            account = await self._services.callers.admit(asked.job, scope)
            try:
                outputs = await JobOutputs.open(self._services.backend, requests, None, asked.job.wishes, parts)
            except BaseException as error:
                account.close(describe(error).label)
                raise
        except BaseException:
            del self._running[job_id]
            raise
        # Streamed or not, who asks for it later gets the whole.
        whole = replace(asked, job=replace(asked.job, stream=False))
        running.task = asyncio.create_task(self._run(whole, outputs, account, running), name=f"background-{job_id}")
        running.task.add_done_callback(lambda _: self._running.pop(job_id))

    async def _run(self, asked: Inquiry, outputs: JobOutputs, account: Account, running: _Running) -> None:
        outcome, problem = Refusal.INTERNAL.value, None
        progress = account.progress = JobProgress(
            asked.job, self._services.metrics, time.monotonic(), outputs.decisions
        )
        try:
            while progress.num_unfinished:
                for index, output in await outputs.next_batch():
                    choice, _ = progress.accept(index, output, time.monotonic())
                    choice.condense()
            outcome = "ok"
        except BatonError as error:
            problem = describe(error)
            outcome = problem.label
            _log.warning("job %s of the background ended: %s", asked.job.job_id, error)
        finally:
            progress.abandon()
            outputs.close()
            account.close(outcome)
        if not running.is_forgotten:
            self._on_end(asked, progress, problem)
