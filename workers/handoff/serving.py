"""Serves what a worker hands over: checks who asks, finds what exports it, and runs each sending end until it is done with."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

from workers.config import WorkerConfig
from workers.errors import Refusal, Refused, StreamDamaged, TransferFailed
from workers.handoff.export import Exporter
from workers.handoff.source import SourceDriver
from workers.handoff.tasks import log_failure
from workers.handoff.wire import down_from_pb, up_to_pb
from workers.identity import Identity
from workers.kv_transfer.memory import KvMemory, same_shape
from workers.kv_transfer.messages import HandoffAccepted, HandoffRefused, Offer, OpenHandoff, Prompt
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.source import Broken, SourceSession
from workers.kv_transfer.transport import Transport
from workers.pb import worker_pb2 as pb
from workers.wire_seal import Sealer, verified

log = logging.getLogger(__name__)


class Serving:
    """The sending ends of one worker. `exporters` says who opens an export of which kind of subject. One event loop uses it."""

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        memory: KvMemory,
        fingerprint: str,
        transports: Mapping[str, Transport],
        exporters: Mapping[type, Exporter],
        counters: Counter[str],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._identity = identity
        self._memory = memory
        self._fingerprint = fingerprint
        self._transports = transports
        self._exporters = exporters
        self._counters = counters
        self._clock = clock
        self._host = socket.gethostname()
        self._sources: dict[SourceDriver, asyncio.Task[None]] = {}

    @property
    def num_running(self) -> int:
        return len(self._sources)

    async def serve(self, incoming: AsyncIterator[pb.HandoffDown]) -> AsyncGenerator[pb.HandoffUp, None]:
        """Answers one Handoff stream."""
        incoming = verified(incoming)
        try:
            async with asyncio.timeout(self._config.transfer_timeout_s):
                first = await anext(incoming)
            opening = down_from_pb(first)
        except (StopAsyncIteration, TimeoutError, TransferFailed, StreamDamaged) as error:
            log.warning("a handoff stream ended before it began: %r", error)
            return
        generation = self._identity.generation
        try:
            if not isinstance(opening, OpenHandoff):
                raise Refused(Refusal.INVALID, "a handoff begins with OpenHandoff")
            self._check(opening, first.generation)
            driver = self._open_source(opening, first.transfer_id, incoming)
        except Refused as refused:
            self._counters["handoffs_refused"] += 1
            refusal = HandoffRefused(refused.refusal, str(refused))
            yield Sealer().seal(up_to_pb(first.transfer_id, generation, refusal))
            return
        outgoing = driver.outgoing()
        try:
            async for message in outgoing:
                yield message
        finally:
            await outgoing.aclose()

    def _open_source(
        self, opening: OpenHandoff, transfer_id: str, incoming: AsyncIterator[pb.HandoffDown]
    ) -> SourceDriver:
        """Raises Refused."""
        exporter = self._exporters.get(type(opening.subject))
        if exporter is None:
            kind = type(opening.subject).__name__
            raise Refused(Refusal.INVALID, f"{self._identity.worker_id} hands over nothing of kind {kind}")
        cut = Cut(self._memory.layout, opening.first_block, opening.num_blocks)
        session = SourceSession(
            cut,
            HandoffAccepted(self._offers(opening), self._memory.layout, self._host),
            self._config.transfer_timeout_s,
            self._config.transfer_window_bytes,
        )
        driver = SourceDriver(
            session,
            self._memory,
            self._transports,
            opening.target,
            transfer_id,
            self._identity.generation,
            self._clock,
            opening.takes_batches,
        )
        export = exporter.open(opening, cut, driver.post)
        task = asyncio.create_task(driver.run(incoming, export), name=f"source-{transfer_id}")
        self._sources[driver] = task
        task.add_done_callback(lambda ended: self._source_ended(driver, ended))
        return driver

    def _offers(self, opening: OpenHandoff) -> tuple[Offer, ...]:
        """Raises Refused when nothing is common."""
        offers: list[Offer] = []
        for name, transport in self._transports.items():
            if name in opening.transports:
                data = transport.offer(opening.target, opening.host)
                if data is not None:
                    offers.append(Offer(name, data))
        if not offers:
            mine, theirs = tuple(self._transports), opening.transports
            raise Refused(Refusal.INVALID, f"no common transport: {mine} here, {theirs} there")
        return tuple(offers)

    def fail_all(self, message: str) -> list[asyncio.Task[None]]:
        """Gives up everything that is handed over from here; returns what has ended when nothing is read any more."""
        for driver in self._sources:
            driver.post(Broken(message, is_ours=True))
        return list(self._sources.values())

    def _check(self, opening: OpenHandoff, generation: int) -> None:
        """Raises Refused."""
        me = self._identity
        if opening.target.generation != generation:
            raise Refused(Refusal.STALE_GENERATION, "the receiver contradicts itself about its generation")
        if opening.source_generation != me.generation:
            raise Refused(
                Refusal.STALE_GENERATION,
                f"{me.worker_id} is in generation {me.generation}, not {opening.source_generation}",
            )
        if me.is_rebuilding:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} waits for a rank")
        if isinstance(opening.subject, Prompt) and me.is_draining:
            raise Refused(Refusal.DRAINING, f"{me.worker_id} drains")
        if isinstance(opening.subject, Prompt) and not me.role.can_prefill:
            raise Refused(Refusal.WRONG_ROLE, f"{me.worker_id} is a {me.role} worker")
        if opening.model_fingerprint != self._fingerprint or not same_shape(opening.layout, self._memory.layout):
            raise Refused(Refusal.INVALID, f"{me.worker_id} serves another model or KV layout")
        if opening.first_block < 0 or opening.num_blocks < 0:
            raise Refused(Refusal.INVALID, "blocks cannot be counted backwards")

    def _source_ended(self, driver: SourceDriver, task: asyncio.Task[None]) -> None:
        self._sources.pop(driver)
        log_failure(task)
        self._counters["handoffs_sent" if not driver.reason else "handoffs_not_taken"] += 1
        self._counters["handoff_sent_bytes"] += driver.sent_bytes
        if driver.reason:
            log.warning("%s gave a handoff up: %s", self._identity.worker_id, driver.reason)
