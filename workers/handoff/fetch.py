"""Has other workers compute prompts for the engine, and takes running sequences over from them; knows no transport and no block."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Protocol

from workers.client import Migration
from workers.engine_thread import Command, Landed, MovedIn, TransferLost
from workers.errors import InvariantViolated, TransferFailed
from workers.handoff.target import Handoff, HandoffFailed
from workers.handoff.tasks import log_failure
from workers.kv_transfer.messages import PrefillDone, Prompt, Running, SequenceMoved, Subject
from workers.kv_transfer.recovery import Choice, Measured, Plan, Way
from workers.request import HandoffReport, Request
from workers.runner import BLOCK_SIZE, Sampled
from workers.status import WorkerAddress
from workers.stepping.result import TransferWanted
from workers.tracing import Span, start_span

log = logging.getLogger(__name__)


class Receive(Protocol):
    """As Transfers.receive."""

    async def __call__(
        self,
        source: WorkerAddress,
        subject: Subject,
        first_block: int,
        blocks: tuple[int, ...],
        plan: Plan | None = None,
    ) -> Handoff: ...


class Fetches:
    """Answers every TransferWanted with one Landed, MovedIn or TransferLost, when nothing writes into the blocks any more.

    `worker_id` is this worker's. One event loop uses it.
    """

    def __init__(
        self,
        worker_id: str,
        receive: Receive,
        post: Callable[[Command], None],
        counters: Counter[str],
        clock: Callable[[], float],
    ) -> None:
        self._worker_id = worker_id
        self._receive = receive
        self._post = post
        self._counters = counters
        self._clock = clock
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.measured = Measured()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def fetch(
        self,
        wanted: TransferWanted,
        request: Request,
        candidates: tuple[WorkerAddress, ...],
        deadline_s: float = math.inf,
    ) -> None:
        """Has the prompt computed by one of the candidates; the engine hears Landed or TransferLost.

        `deadline_s` (of the clock) is when the first token is due: it decides how to go on after a fault.
        """
        num_tokens = len(request.prompt_token_ids) - wanted.first_block * BLOCK_SIZE
        plan = Plan(self.measured, deadline_s, num_tokens, tuple(c.worker_id for c in candidates))
        self._start(wanted.sequence_id, "fetch", self._fetch(wanted, request, candidates, plan))

    def take_over(self, wanted: TransferWanted, running: Migration) -> None:
        """Has a running sequence's blocks and state sent here; the engine hears MovedIn or TransferLost."""
        self._start(wanted.sequence_id, "take-over", self._take_over(wanted, running))

    def _start(self, sequence_id: int, verb: str, work: Coroutine[None, None, None]) -> None:
        task = self._tasks[sequence_id] = asyncio.create_task(work, name=f"{verb}-{sequence_id}")
        task.add_done_callback(lambda ended: self._ended(sequence_id, ended))

    def _ended(self, sequence_id: int, task: asyncio.Task[None]) -> None:
        """However it ended, nothing writes into the blocks any more (`receive`), and the engine must hear of it."""
        self._tasks.pop(sequence_id)
        if task.cancelled() or task.exception() is not None:
            self.decline(sequence_id)
            log_failure(task)

    def decline(self, sequence_id: int) -> None:
        """Nobody waits for this sequence any more, or no transfer came about."""
        me = self._worker_id
        self._post(TransferLost(sequence_id, HandoffReport(me, me, "local")))

    async def _take_over(self, wanted: TransferWanted, running: Migration) -> None:
        me, source = self._worker_id, running.source
        try:
            handoff = await self._receive(source, Running(running.request_id), wanted.first_block, wanted.blocks)
        except TransferFailed as error:
            self._counters["migrations_in_failed"] += 1
            log.warning("%s could not take over %s from %s: %s", me, running.request_id, source.worker_id, error)
            self.decline(wanted.sequence_id)
            return
        done = handoff.done
        if not isinstance(done, SequenceMoved):
            raise InvariantViolated(f"a running sequence ended with {type(done).__name__}")
        self._post(MovedIn(wanted.sequence_id, done.known_token_ids, done.num_computed))
        self._counters["migrations_in"] += 1
        self._counters["migrated_bytes"] += handoff.kv_bytes

    def abandon(self, sequence_id: int) -> None:
        """The request was cancelled: stop the transfer, then the engine hears TransferLost and frees the blocks."""
        task = self._tasks.get(sequence_id)
        if task is not None:
            task.cancel()

    def abandon_all(self) -> list[asyncio.Task[None]]:
        """As `abandon`, for all; returns what is still to end."""
        for task in self._tasks.values():
            task.cancel()
        return list(self._tasks.values())

    async def _fetch(
        self, wanted: TransferWanted, request: Request, candidates: tuple[WorkerAddress, ...], plan: Plan
    ) -> None:
        me = self._worker_id
        report = HandoffReport(me, me, "local", attempts=0)
        for source in candidates:
            report = replace(report, attempts=report.attempts + 1)
            plan.ask(source.worker_id, self._clock())
            attributes = {"source": source.worker_id, "target": me, "attempt": report.attempts}
            span = start_span("handoff", request.traceparent, attributes=attributes)
            subject = Prompt(replace(request, traceparent=span.traceparent), wanted.hint)
            fault = "cancelled"
            try:
                handoff = await self._receive(source, subject, wanted.first_block, wanted.blocks, plan)
            except HandoffFailed as error:
                fault = str(error)
                choice = plan.after_fault(self._clock())
                report = self._lost(report, error, choice)
                span.set(recovery=choice.way.value, expected_s=choice.expected_s, fits=choice.fits)
                log.warning("%s could not fetch a prompt from %s: %s: %s", me, source.worker_id, error, choice.way)
                if choice.way is Way.LOCAL:
                    break
            else:
                fault = ""
                self._landed(wanted, source, handoff, report, span, len(request.prompt_token_ids))
                return
            finally:
                span.end(fault)
        self._counters["local_prefills_after_failure"] += 1
        self._post(TransferLost(wanted.sequence_id, replace(report, attempts=report.attempts + 1)))

    def _lost(self, report: HandoffReport, error: HandoffFailed, choice: Choice) -> HandoffReport:
        self._counters["handoffs_failed"] += 1
        self._counters[f"recovery_{choice.way}"] += 1
        self._counters[f"recovery_{Way.NEXT_TRANSPORT}"] += error.degradations
        return replace(
            report,
            resends=report.resends + error.resends,
            degradations=report.degradations + error.degradations,
            recovery=choice.way.value,
        )

    def _landed(
        self,
        wanted: TransferWanted,
        source: WorkerAddress,
        handoff: Handoff,
        so_far: HandoffReport,
        span: Span,
        num_prompt: int,
    ) -> None:
        done = handoff.done
        if not isinstance(done, PrefillDone):
            raise InvariantViolated(f"a prompt ended with {type(done).__name__}")
        self._counters["handoffs_landed"] += 1
        self._counters[f"handoffs_landed_{handoff.transport}"] += 1
        self._counters["handoff_received_bytes"] += handoff.kv_bytes
        self._counters[f"recovery_{Way.NEXT_TRANSPORT}"] += handoff.degradations
        num_computed = num_prompt - done.cached_tokens
        self.measured.landed(source.worker_id, handoff.kv_bytes, handoff.transfer_s, num_computed, done.prefill_s)
        report = replace(
            so_far,
            prefill_worker=source.worker_id,
            transport=handoff.transport,
            kv_bytes=handoff.kv_bytes,
            transfer_s=handoff.transfer_s,
            prefill_s=done.prefill_s,
            wait_s=handoff.wait_s,
            exposed_s=handoff.exposed_s,
            resends=so_far.resends + handoff.resends,
            degradations=so_far.degradations + handoff.degradations,
            recovery=Way.NEXT_TRANSPORT.value if handoff.degradations else so_far.recovery,
        )
        span.set(
            transport=handoff.transport,
            kv_bytes=handoff.kv_bytes,
            transfer_s=handoff.transfer_s,
            wait_s=handoff.wait_s,
            exposed_s=handoff.exposed_s,
            resends=handoff.resends,
            degradations=handoff.degradations,
        )
        sampled = Sampled(wanted.sequence_id, done.token_id, done.logprob)
        self._post(Landed(wanted.sequence_id, sampled, done.cached_tokens, report))
