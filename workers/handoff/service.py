"""Serves what a worker hands over: reads who asks for what, and runs each sending end until it is done with. Decides nothing.

Who may have what, and what fills a transfer, is the business of whoever opens the exports: the worker core.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

from workers.config import WorkerConfig
from workers.errors import Refusal, Refused, StreamDamaged, TransferFailed
from workers.handoff.protobuf import down_from_pb, up_to_pb
from workers.handoff.protocol.messages import HandoffAccepted, HandoffRefused, Offer, OpenHandoff
from workers.handoff.protocol.source_session import HandoffBroken, SourceSession
from workers.handoff.source_driver import ExportFeed, HandoffExport, SourceDriver
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2 as pb
from workers.status import Identity
from workers.transports.contract import Transport
from workers.wire.streams import Sealer, verified

log = logging.getLogger(__name__)

OpenExport = Callable[[OpenHandoff, int, ExportFeed], HandoffExport]
"""`open_export(opening, generation, feed)`: `generation` is the receiver's as its envelope says, `feed` takes what there is to
say, once it has been started. Raises Refused; what it returns is released exactly once, whatever happens."""


class Serving:
    """The sending ends of one worker. One event loop uses it."""

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        memory: KvMemory,
        transports: Mapping[str, Transport],
        open_export: OpenExport,
        counters: Counter[str],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._identity = identity
        self._memory = memory
        self._transports = transports
        self._open_export = open_export
        self._counters = counters
        self._clock = clock
        self._host = socket.gethostname()
        self._sources: dict[SourceDriver, asyncio.Task[None]] = {}

    @property
    def num_running(self) -> int:
        return len(self._sources)

    async def serve(
        self, incoming: AsyncIterator[pb.HandoffDown], is_caller: Callable[[str], bool] = lambda _: True
    ) -> AsyncGenerator[pb.HandoffUp, None]:
        """Answers one Handoff stream. `is_caller(worker_id)`: whether that is who opened it; nobody else gets anything."""
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
            if not is_caller(opening.target.worker_id):
                log.warning("a handoff to %r was asked for by somebody else", opening.target.worker_id)
                raise Refused(Refusal.INVALID, "a worker gets handoffs in its own name only")
            driver = self._open_source(opening, first, incoming)
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
        self, opening: OpenHandoff, first: pb.HandoffDown, incoming: AsyncIterator[pb.HandoffDown]
    ) -> SourceDriver:
        """Raises Refused."""
        export = self._open_export(opening, first.generation, lambda event: driver.post(event))
        try:
            offers = self._offers(opening)
        except Refused as refused:
            export.release(str(refused))
            raise
        session = SourceSession(
            Cut(self._memory.layout, opening.first_block, opening.num_blocks),
            HandoffAccepted(offers, self._memory.layout, self._host),
            self._config.transfer_timeout_s,
            self._config.transfer_window_bytes,
        )
        driver = SourceDriver(
            session,
            self._memory,
            self._transports,
            opening.target,
            first.transfer_id,
            self._identity.generation,
            self._clock,
            opening.takes_batches,
            opening.subject.log_fields,
        )
        task = asyncio.create_task(driver.run(incoming, export), name=f"source-{first.transfer_id}")
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
            driver.post(HandoffBroken(message, is_ours=True))
        return list(self._sources.values())

    def _source_ended(self, driver: SourceDriver, task: asyncio.Task[None]) -> None:
        self._sources.pop(driver)
        if not task.cancelled() and task.exception() is not None:  # it has cleaned up behind itself, and must be seen
            log.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception(), extra=driver.about)
        self._counters["handoffs_sent" if not driver.reason else "handoffs_not_taken"] += 1
        self._counters["handoff_sent_bytes"] += driver.sent_bytes
        if driver.reason:
            log.warning("%s gave a handoff up: %s", self._identity.worker_id, driver.reason, extra=driver.about)
