"""Follows requests whose clients have gone and may come back, for a while: so their tenants' places are taken, and what they used is known.

Workers let them run on when this router is gone as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from router.api.callers import Account
from router.api.job_outputs import JobOutputs
from router.api.job_progress import JobProgress
from workers.errors import BatonError


@dataclass(frozen=True, slots=True)
class _Follower:
    account: Account
    task: asyncio.Task[None]


class Unattended:
    """Each for `grace_s` at most, and of one job only what its last client has left. Used by one event loop."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._followers: dict[str, _Follower] = {}
        """By job."""

    def take(self, outputs: JobOutputs, progress: JobProgress, account: Account) -> None:
        """What is said from now on is read by nobody. In the end all of these are closed."""
        job_id = progress.job.job_id
        if job_id in self._followers:  # two followers would take two places of the router for one job
            self._followers.pop(job_id).task.cancel()
        task = asyncio.create_task(self._follow(outputs), name=f"unattended-{job_id}")
        follower = self._followers[job_id] = _Follower(account, task)

        def end(_: asyncio.Task[None]) -> None:  # also of a task that was cancelled before its first step
            if self._followers.get(job_id) is follower:
                del self._followers[job_id]
            progress.go_on_to(outputs.num_tokens)
            progress.abandon()
            outputs.close()
            account.close("client_disconnected", outputs.has_ended and not outputs.is_broken)

        task.add_done_callback(end)

    @contextmanager
    def giving_place(self, job_id: str) -> Iterator[None]:
        """Within it a client that has come back may take the place, of its tenant's `max_concurrent`, that its job has kept here. Where
        it raises, the client is refused all the same, and the job has the place again."""
        follower = self._followers.get(job_id)
        if follower is None or not follower.account.give_place():
            yield
            return
        try:
            yield
        except BaseException:
            follower.account.take_place_back()
            raise

    async def _follow(self, outputs: JobOutputs) -> None:
        try:
            async with asyncio.timeout(self._grace_s):
                while not outputs.has_ended:
                    await outputs.next_batch()
                    outputs.wrote()  # nobody needs a heartbeat
        except (TimeoutError, BatonError):
            pass
