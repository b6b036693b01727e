"""Runs jobs that no client waits for to their end. Workers own them: a router that dies takes none with it, but no longer runs them again elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.types import Scope

from router.api.asking import Inquiry
from router.api.callers import Account
from router.api.job_run import JobOutputs, JobProgress
from router.api.problems import describe
from workers.errors import BatonError, Refusal, Refused

if TYPE_CHECKING:
    from router.api.answer import Services

_log = logging.getLogger(__name__)


class BackgroundJobs:
    """At most `services.config.max_background` at once. Used by one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._running: dict[str, asyncio.Task[None]] = {}

    async def begin(self, asked: Inquiry, scope: Scope) -> None:
        """Submits a job and returns. Raises Refused, InvalidRequest, Rejected."""
        if len(self._running) >= self._services.config.max_background:
            raise Refused(Refusal.QUEUE_FULL, "too many responses run in the background here", 1.0)
        requests, parts = asked.requests(None)
        job = replace(asked.job, stream=True)  # its outputs are not kept here
        account = await self._services.callers.admit(job, scope)
        try:
            outputs = await JobOutputs.open(self._services.backend, requests, None, job.wishes, parts)
        except BaseException as error:
            account.close(describe(error).label)
            raise
        task = asyncio.create_task(
            self._run(replace(asked, job=job), outputs, account), name=f"background-{job.job_id}"
        )
        self._running[job.job_id] = task
        task.add_done_callback(lambda _: self._running.pop(job.job_id, None))

    async def _run(self, asked: Inquiry, outputs: JobOutputs, account: Account) -> None:
        outcome = Refusal.INTERNAL.value
        progress = account.progress = JobProgress(
            asked.job, self._services.metrics, time.monotonic(), outputs.decisions
        )
        try:
            while progress.num_unfinished:
                for index, output in await outputs.next_batch():
                    progress.accept(index, output, time.monotonic())
            outcome = "ok"
        except BatonError as error:
            outcome = describe(error).label
            _log.warning("job %s of the background ended: %s", asked.job.job_id, error)
        finally:
            progress.abandon()
            outputs.close()
            account.close(outcome)
