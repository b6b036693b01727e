"""All KV handoffs of one worker, in both directions: puts together what serves, what fetches and what receives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping

from workers.config import WorkerConfig
from workers.errors import InvalidConfig, Refusal, TransferFailed
from workers.handoff.protocol.choices import Plan
from workers.handoff.protocol.messages import Handoff, HandoffFailed, OpenHandoff, Subject
from workers.handoff.protocol.target_session import TargetSession
from workers.handoff.service import OpenExport, Serving
from workers.handoff.target_driver import TargetDriver
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.kv_memory.prefault import Prefault
from workers.pb import worker_pb2_grpc
from workers.status import Identity, WorkerAddress
from workers.transports.contract import Sweeping, Transport
from workers.trust import parties
from workers.trust.channels import open_channel
from workers.trust.credentials import Credentials
from workers.wire.streams import HANDOFF_CHANNEL

MAX_CHANNELS = 256


class PeerChannel:
    """A channel to one worker and how many transfers use it."""

    def __init__(self, key: tuple[str, str], credentials: Credentials | None) -> None:
        self.key = key
        worker_id, target = key
        try:
            self.channel = open_channel(target, HANDOFF_CHANNEL, credentials, parties.worker(worker_id))
        except InvalidConfig as error:
            raise TransferFailed(f"no worker has that id: {error}") from error
        self.stub: worker_pb2_grpc.WorkerStub = worker_pb2_grpc.WorkerStub(self.channel)  # type: ignore[no-untyped-call]
        self.num_users = 0


class Peers:
    """Beyond `max_channels` the one that is not in use and was taken longest ago is closed. Used from one event loop."""

    def __init__(self, credentials: Credentials | None = None, max_channels: int = MAX_CHANNELS) -> None:
        self._credentials = credentials
        self._max_channels = max_channels
        self._peers: OrderedDict[tuple[str, str], PeerChannel] = OrderedDict()

    async def take(self, source: WorkerAddress) -> PeerChannel:
        """A channel to that worker, in use until it is given back; connecting happens with the first call.

        Raises TransferFailed when all channels are in use, or no worker can have that id.
        """
        key = _key(source)
        peer = self._peers.get(key)
        if peer is None:
            idle = None
            if len(self._peers) >= self._max_channels:
                idle = next((other for other in self._peers.values() if not other.num_users), None)
                if idle is None:
                    raise TransferFailed(f"{self._max_channels} senders are connected and in use")
                del self._peers[idle.key]
            peer = self._peers[key] = PeerChannel(key, self._credentials)
            peer.num_users += 1
            if idle is not None:
                try:
                    await idle.channel.close()
                except BaseException:
                    self.give(peer)
                    raise
            return peer
        peer.num_users += 1
        self._peers.move_to_end(key)
        return peer

    def give(self, peer: PeerChannel) -> None:
        """One transfer uses it less."""
        peer.num_users -= 1

    async def forget(self, source: WorkerAddress) -> None:
        """Closes the channel to a peer that broke, so that its successor is dialled afresh."""
        peer = self._peers.pop(_key(source), None)
        if peer is not None:
            await peer.channel.close()

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.channel.close()
        self._peers.clear()


def _key(source: WorkerAddress) -> tuple[str, str]:
    return source.worker_id, source.target


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
        task.add_done_callback(lambda ended: self._target_ended(driver, peer, ended, subject.log_fields))
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

    def _target_ended(
        self, driver: TargetDriver, peer: PeerChannel, task: asyncio.Task[None], about: Mapping[str, str]
    ) -> None:
        self._targets.pop(driver)
        self._peers.give(peer)
        if not task.cancelled() and task.exception() is not None:  # it has cleaned up behind itself, and must be seen
            log.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception(), extra=about)

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
