"""Watches over a worker's ranks beside its event loop: suspends the worker when one is lost, resumes it when all are there.

Knows no model and no Ray: somebody else starts ranks, and hears from here which one to replace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from workers.status import RankStatus

log = logging.getLogger(__name__)

WAIT_S = 0.5
"""How long a thread waits for the group at a time; it is woken at once when the group is whole."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What a worker's owner arranges for its ranks.

    Ranks find the leader at the address that `on_listening` hears of, and prove with `token` that they belong to it.
    `on_lost(rank, reason)` is called on the worker's event loop when a rank is gone or silent: see that its process ends, and
    that another one takes its place.
    """

    host: str
    token: str
    on_listening: Callable[[tuple[str, int]], None]
    on_lost: Callable[[RankStatus, str], None]
    port: int = 0
    """0: any free one."""


class Ranks(Protocol):
    """What is watched: workers.group.runner.GroupRunner."""

    @property
    def is_serving(self) -> bool: ...

    @property
    def epoch(self) -> int: ...

    def wait_serving(self, timeout_s: float) -> bool: ...

    def rank_status(self) -> tuple[RankStatus, ...]: ...

    @property
    def imbalance_seen(self) -> float: ...

    def stop(self) -> None: ...


class Suspendable(Protocol):
    """A worker's driver."""

    def suspend(self, reason: str) -> None: ...

    def resume(self) -> None: ...


class GroupWatch:
    """One event loop; only `lost` may be called from other threads."""

    def __init__(self, patience_s: float, on_lost: Callable[[RankStatus, str], None]) -> None:
        """`patience_s`: a group that is not whole for this long suspends its worker, though no rank was reported lost."""
        self._patience_s = patience_s
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._ranks: Ranks | None = None
        self._server: Suspendable | None = None
        self._task: asyncio.Task[None] | None = None
        self._num_lost = 0
        self._num_rebuilds = 0
        self._rebuild_s = 0.0
        self._broken_since_s: float | None = None

    def lost(self, rank: int, reason: str) -> None:
        """A rank is gone: by whoever noticed it, on whatever thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: the process is ending
            self._loop.call_soon_threadsafe(self._lose, rank, reason)

    async def wait_formed(self, ranks: Ranks) -> None:
        """Waits for the first epoch; its caller bounds the wait."""
        self._ranks = ranks
        while not await asyncio.to_thread(ranks.wait_serving, WAIT_S):
            pass

    def start(self, server: Suspendable) -> None:
        """From now on suspends and resumes this server."""
        self._server = server
        self._task = asyncio.create_task(self._watch(), name="group-watch")

    def pause(self) -> None:
        """Before the worker stops: no loss is acted upon any more."""
        self._server = None
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """Ends the watch and the group."""
        self.pause()
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.stop)

    def rank_status(self) -> tuple[RankStatus, ...]:
        return self._ranks.rank_status() if self._ranks is not None else ()

    def counters(self) -> tuple[tuple[str, float], ...]:
        """Totals since the start; `rebuild_seconds` is the time without service, from the notice of a loss on."""
        assert self._ranks is not None
        return (
            ("expert_imbalance", self._ranks.imbalance_seen),
            ("group_epoch", float(self._ranks.epoch)),
            ("ranks_lost", float(self._num_lost)),
            ("rebuilds", float(self._num_rebuilds)),
            ("rebuild_seconds", self._rebuild_s),
        )

    def _lose(self, rank: int, reason: str) -> None:
        self._num_lost += 1
        known = {status.rank: status for status in self.rank_status()}
        self._on_lost(known.get(rank, RankStatus(rank)), reason)
        self._suspend(f"rank {rank}: {reason}")

    def _suspend(self, reason: str) -> None:
        if self._broken_since_s is None:
            self._broken_since_s = time.monotonic()
        if self._server is not None:
            self._server.suspend(reason)

    async def _watch(self) -> None:
        assert self._ranks is not None and self._server is not None
        silent_since_s: float | None = None
        while True:
            is_whole = await asyncio.to_thread(self._ranks.wait_serving, WAIT_S)
            now = time.monotonic()
            if is_whole:
                silent_since_s = None
                if self._broken_since_s is not None:
                    self._num_rebuilds += 1
                    self._rebuild_s += now - self._broken_since_s
                    log.info("the group is whole again after %.1f s", now - self._broken_since_s)
                    self._broken_since_s = None
                    self._server.resume()
                await asyncio.sleep(WAIT_S)
            else:
                silent_since_s = now if silent_since_s is None else silent_since_s
                if self._broken_since_s is None and now - silent_since_s > self._patience_s:
                    self._suspend("its ranks do not find together")
