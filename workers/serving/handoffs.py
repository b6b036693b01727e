"""Runs the handoffs that the core has decided on, both those it asks for and those it serves. Decides nothing."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from workers.config import WorkerConfig
from workers.errors import Refusal, Refused, TransferFailed
from workers.handoff.protocol.messages import Handoff, HandoffFailed, OpenHandoff
from workers.handoff.source_driver import ExportFeed as FeedTransfer
from workers.handoff.source_driver import HandoffExport
from workers.handoff.transfers import CLOSE_S, Transfers
from workers.kv_memory.memory import KvMemory
from workers.serving.events import (
    AcceptHandoff,
    Event,
    Feed,
    HandoffAcknowledged,
    HandoffAsked,
    HandoffBegun,
    HandoffEnded,
    HandoffReleased,
    Receive,
    RefuseHandoff,
)
from workers.status import Identity
from workers.transports.contract import Transport
from workers.trust.credentials import Credentials

log = logging.getLogger(__name__)


class _Served:
    """An HandoffExport that the core fills."""

    def __init__(self, owner: Handoffs, transfer: int, is_paced: bool) -> None:
        self._owner = owner
        self._transfer = transfer
        self.is_paced = is_paced

    def start(self) -> None:
        self._owner.handle(HandoffBegun(self._transfer))

    def acknowledged(self, num_pieces: int) -> None:
        self._owner.handle(HandoffAcknowledged(self._transfer, num_pieces))

    def release(self, reason: str) -> None:
        self._owner.released(self._transfer, reason)


class Handoffs:
    """`handle` takes an event for the core; `counters` are the core's. Used from one event loop."""

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        memory: KvMemory,
        fingerprint: str,
        transports: Mapping[str, Transport],
        counters: Counter[str],
        clock: Callable[[], float],
        handle: Callable[[Event], None],
        credentials: Credentials | None = None,
    ) -> None:
        self.handle = handle
        self.transfers = Transfers(
            config, identity, memory, fingerprint, transports, self._open_export, counters, clock, credentials
        )
        self._receives: dict[int, asyncio.Task[Handoff]] = {}
        self._numbers = itertools.count(1)
        self._feeds: dict[int, FeedTransfer] = {}
        self._answers: dict[int, AcceptHandoff | RefuseHandoff] = {}
        """To handoffs that are being asked for at this moment."""

    @property
    def num_running(self) -> int:
        """0 when idle, or something leaks."""
        return self.transfers.num_running + len(self._receives)

    # ---- asked for ----

    def receive(self, command: Receive) -> None:
        """As Receive."""
        name = f"receive-{command.sequence_id}"
        task = self._receives[command.sequence_id] = asyncio.create_task(self._received(command), name=name)
        task.add_done_callback(lambda ended: self._receive_ended(command, ended))

    def stop_receiving(self, sequence_id: int) -> None:
        """As StopReceiving."""
        task = self._receives.get(sequence_id)
        if task is not None:
            task.cancel()

    async def _received(self, command: Receive) -> Handoff:
        async with asyncio.timeout(command.patience_s):
            return await self.transfers.receive(
                command.source, command.subject, command.first_block, command.blocks, command.plan
            )

    def _receive_ended(self, command: Receive, task: asyncio.Task[Handoff]) -> None:
        """However it ended, nothing writes into the blocks any more (`Transfers.receive`), and the engine must hear of it."""
        del self._receives[command.sequence_id]
        outcome: Handoff | HandoffFailed | None = None
        error = None if task.cancelled() else task.exception()
        match error:
            case None:
                outcome = None if task.cancelled() else task.result()
            case HandoffFailed():
                outcome = error
            case TransferFailed() | TimeoutError():
                outcome = HandoffFailed(str(error) or "it took too long", Refusal.INTERNAL)
            case _:
                log.error("%s ended unexpectedly", task.get_name(), exc_info=error, extra=command.subject.log_fields)
        self.handle(HandoffEnded(command.sequence_id, outcome))

    # ---- served ----

    def _open_export(self, opening: OpenHandoff, generation: int, feed: FeedTransfer) -> HandoffExport:
        """As workers.handoff.service.OpenExport."""
        transfer = next(self._numbers)
        self.handle(HandoffAsked(transfer, opening, generation))
        answer = self._answers.pop(transfer)
        if isinstance(answer, RefuseHandoff):
            raise Refused(answer.refusal, answer.message)
        self._feeds[transfer] = feed
        return _Served(self, transfer, answer.is_paced)

    def answer(self, command: AcceptHandoff | RefuseHandoff) -> None:
        """As the command says, before `handle` returns."""
        self._answers[command.transfer] = command

    def feed(self, command: Feed) -> None:
        """As Feed."""
        feed = self._feeds.get(command.transfer)
        if feed is not None:
            feed(command.event)

    def released(self, transfer: int, reason: str) -> None:
        """As HandoffExport.release."""
        del self._feeds[transfer]
        self.handle(HandoffReleased(transfer, reason))

    # ---- life ----

    async def close(self) -> None:
        """Ends every transfer and the transports; the core has been closed before."""
        if self._receives:
            await asyncio.wait(set(self._receives.values()), timeout=CLOSE_S)
        await self.transfers.close()
