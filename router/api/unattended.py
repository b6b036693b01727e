"""Follows requests whose clients have gone and may come back, for a while: so their tenants' places are taken, and what they used is known.

Workers let them run on when this router is gone as well.
"""

from __future__ import annotations

import asyncio

from router.api.callers import Account
from router.api.job_run import JobOutputs, JobProgress
from workers.errors import BatonError


class Unattended:
    """Each for `grace_s` at most. Used by one event loop."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, outputs: JobOutputs, progress: JobProgress, account: Account) -> None:
        """What is said from now on is read by nobody. In the end all of these are closed."""
        task = asyncio.create_task(self._follow(outputs, progress, account), name=f"unattended-{progress.job.job_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, outputs: JobOutputs, progress: JobProgress, account: Account) -> None:
        try:
            async with asyncio.timeout(self._grace_s):
                while not outputs.has_ended:
                    await outputs.next_batch()
                    outputs.wrote()  # nobody needs a heartbeat
        except (TimeoutError, BatonError):
            pass
        finally:
            progress.go_on_to(outputs.num_tokens)
            progress.abandon()
            outputs.close()
            account.close("client_disconnected", outputs.has_ended)
