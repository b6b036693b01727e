"""Fetches prefix blocks from peers that hold them, where that beats computing; whatever fails is computed. Knows no scheduler."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from workers.engine_thread import Command, Pulled
from workers.errors import TransferFailed
from workers.handoff.prefix_export import subject_of
from workers.handoff.target import Handoff
from workers.kv_transfer.memory import KvLayout
from workers.kv_transfer.messages import PrefixDone, Subject
from workers.kv_transfer.worth import PullRates, is_worth_pulling
from workers.status import WorkerAddress
from workers.stepping.result import PullWanted

log = logging.getLogger(__name__)

MIN_PATIENCE_S = 1.0

Receive = Callable[[WorkerAddress, Subject, int, tuple[int, ...]], Awaitable[Handoff]]
"""As Transfers.receive."""


class PrefixPuller:
    """Answers every PullWanted with exactly one Pulled, when nothing writes into the blocks any more. One event loop uses it."""

    def __init__(
        self,
        receive: Receive,
        layout: KvLayout,
        post: Callable[[Command], None],
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._receive = receive
        self._layout = layout
        self._post = post
        self._timeout_s = timeout_s
        self._clock = clock
        self._rates = PullRates()
        self._tasks: dict[int, asyncio.Task[int]] = {}
        self.counters: Counter[str] = Counter()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def pull(self, wanted: PullWanted) -> None:
        num_blocks = len(wanted.keys)
        num_tokens, num_bytes = num_blocks * self._layout.block_size, num_blocks * self._layout.block_bytes
        rate = self._rates.rate(wanted.peer.worker_id, self._clock())
        if not is_worth_pulling(num_tokens, num_bytes, wanted.prefill_tokens_per_s, rate):
            self.counters["prefix_pulls_not_worth_it"] += 1
            self._post(Pulled(wanted.sequence_id, 0))
            return
        task = asyncio.create_task(self._pull(wanted, num_tokens), name=f"pull-{wanted.sequence_id}")
        self._tasks[wanted.sequence_id] = task
        task.add_done_callback(lambda _: self._ended(wanted.sequence_id, task))

    def abandon(self, sequence_id: int) -> None:
        """Nobody wants the blocks any more; Pulled comes when nothing writes into them."""
        task = self._tasks.get(sequence_id)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    def _ended(self, sequence_id: int, task: asyncio.Task[int]) -> None:
        """However it ended: `receive` returns only when nothing writes any more."""
        del self._tasks[sequence_id]
        num_blocks = 0
        if task.cancelled():
            pass
        elif (error := task.exception()) is not None:
            log.error("a pull ended unexpectedly", exc_info=error)
        else:
            num_blocks = task.result()
        self._post(Pulled(sequence_id, num_blocks))

    async def _pull(self, wanted: PullWanted, num_tokens: int) -> int:
        """How many blocks landed. Not waited for longer than computing them would take, or a second."""
        patience_s = self._timeout_s
        if wanted.prefill_tokens_per_s > 0:
            patience_s = min(patience_s, max(MIN_PATIENCE_S, num_tokens / wanted.prefill_tokens_per_s))
        self.counters["prefix_pulls"] += 1
        started = self._clock()
        num_blocks = num_bytes = 0
        try:
            async with asyncio.timeout(patience_s):
                handoff = await self._receive(wanted.peer, subject_of(wanted.keys), wanted.first_block, wanted.blocks)
            if isinstance(handoff.done, PrefixDone):
                num_blocks = min(handoff.done.num_blocks, handoff.kv_bytes // self._layout.block_bytes)
                num_bytes = handoff.kv_bytes
        except (TransferFailed, TimeoutError) as error:
            self.counters["prefix_pulls_failed"] += 1
            log.warning("%s did not send a prefix: %s", wanted.peer.worker_id, error or "it took too long")
            self._rates.note(wanted.peer.worker_id, 0, self._clock() - started, self._clock())
            return 0
        if num_blocks:
            self._rates.note(wanted.peer.worker_id, num_bytes, self._clock() - started, self._clock())
        else:
            self.counters["prefix_pulls_empty"] += 1
        self.counters["prefix_pulled_blocks"] += num_blocks
        self.counters["prefix_pulled_bytes"] += num_bytes
        return num_blocks
