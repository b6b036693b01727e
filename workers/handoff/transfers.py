"""All KV handoffs of one worker, in both directions: puts together what serves, what fetches and what receives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Mapping

from workers.config import WorkerConfig
from workers.errors import Refusal, TransferFailed
from workers.handoff.outcome import Handoff, HandoffFailed
from workers.handoff.peers import Peer, Peers
from workers.handoff.protocol.messages import OpenHandoff, Subject
from workers.handoff.protocol.recovery import Plan
from workers.handoff.protocol.target_session import TargetSession
from workers.handoff.service import OpenExport, Serving
from workers.handoff.target_driver import TargetDriver
from workers.identity import Identity
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.kv_memory.prefault import Prefault
from workers.status import WorkerAddress
from workers.transports.contract import Sweeping, Transport
from workers.trust.credentials import Credentials

log = logging.getLogger(__name__)

CLOSE_S = 5.0


class Transfers:
    """Owns every running handoff. Used from the event loop only.

    `transports` are best first. A stream of another worker goes to `serving`, which asks `open_export`; what this worker wants
    of others goes to `receive`. `counters` are the worker's.
    """

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        memory: KvMemory,
        fingerprint: str,
        transports: Mapping[str, Transport],
        open_export: OpenExport,
        counters: Counter[str],
        clock: Callable[[], float],
        credentials: Credentials | None = None,
    ) -> None:
        self._config = config
        self._identity = identity
        self._memory = memory
        self._prefault = Prefault(memory)
        self._fingerprint = fingerprint
        self._clock = clock
        self._transports = transports
        self._peers = Peers(credentials)
        self._host = socket.gethostname()
        self._targets: dict[TargetDriver, asyncio.Task[None]] = {}
        self.serving = Serving(config, identity, memory, transports, open_export, counters, clock)

    @property
    def num_running(self) -> int:
        """Handoffs under way at either end; 0 when idle, or something leaks."""
        return len(self._targets) + self.serving.num_running

    async def receive(
        self,
        source: WorkerAddress,
        subject: Subject,
        first_block: int,
        blocks: tuple[int, ...],
        plan: Plan | None = None,
    ) -> Handoff:
        """Has `source` fill the entries from `first_block` on of the block table `blocks`, of this pool.

        When it returns everything is in place and verified. When it raises TransferFailed, or is cancelled, nothing writes
        into the blocks any more.
        """
        cut = Cut(self._memory.layout, first_block, len(blocks) - first_block)
        opening = OpenHandoff(
            target=self._identity.address,
            host=self._host,
            source_generation=source.generation,
            model_fingerprint=self._fingerprint,
            layout=self._memory.layout,
            subject=subject,
            first_block=first_block,
            num_blocks=cut.num_blocks,
            transports=tuple(self._transports),
            takes_batches=True,
        )
        session = TargetSession(cut, opening, self._config.transfer_timeout_s, plan=plan)
        driver = TargetDriver(session, self._memory, self._transports, source, blocks, uuid.uuid4().hex, self._clock)
        fresh = self._prefault.fresh(blocks[first_block:])
        if fresh:
            asyncio.get_running_loop().run_in_executor(None, self._prefault.back, fresh)
        try:
            peer = await self._peers.take(source)
        except TransferFailed as error:
            raise HandoffFailed(str(error), Refusal.INTERNAL) from error
        task = asyncio.create_task(driver.run(peer.stub), name=f"target-{source.worker_id}")
        self._targets[driver] = task
        task.add_done_callback(lambda ended: self._target_ended(driver, peer, ended))
        try:
            return await asyncio.shield(driver.outcome)
        except asyncio.CancelledError:
            driver.cancel()
            await _until_done(driver.outcome)
            raise
        except HandoffFailed as error:
            if error.refusal is Refusal.WORKER_LOST:
                await self._forget(source)
            raise

    def _target_ended(self, driver: TargetDriver, peer: Peer, task: asyncio.Task[None]) -> None:
        self._targets.pop(driver)
        self._peers.give(peer)
        if not task.cancelled() and task.exception() is not None:  # it has cleaned up behind itself, and must be seen
            log.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception())

    async def _forget(self, source: WorkerAddress) -> None:
        """Its successor is to be dialled afresh."""
        await self._peers.forget(source)
        for transport in self._transports.values():
            await transport.forget(source.worker_id)

    async def tick(self) -> None:
        """Now and then: lets go of what dead peers left behind."""
        for transport in self._transports.values():
            if isinstance(transport, Sweeping):
                await transport.sweep()

    async def close(self) -> None:
        """Ends every transfer and the transports."""
        reason = "the worker is stopping"
        tasks: set[asyncio.Task[None]] = set()
        for driver, task in self._targets.items():
            driver.cancel(reason)
            tasks.add(task)
        tasks.update(self.serving.fail_all(reason))
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        await self._peers.close()
        for transport in self._transports.values():
            await transport.close()


async def _until_done(outcome: asyncio.Future[Handoff]) -> None:
    """However often the waiting task is cancelled: the blocks may not be given away before."""
    while not outcome.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({outcome})
    outcome.exception()  # seen
