"""All KV handoffs of one worker, in both directions: serves what it exports, and receives what the engine wants."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

from workers.client import Migration
from workers.config import WorkerConfig
from workers.engine_thread import Command, Landed, MovedIn, TransferLost
from workers.errors import InvariantViolated, Refusal, Refused, StreamDamaged, TransferFailed
from workers.handoff_export import Exporter, PromptExporter
from workers.handoff_source import SourceDriver
from workers.handoff_target import Handoff, HandoffFailed, TargetDriver
from workers.kv_transfer.copier import same_shape
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.messages import (
    HandoffAccepted,
    HandoffRefused,
    Offer,
    OpenHandoff,
    PrefillDone,
    Prefix,
    Prompt,
    Running,
    SequenceMoved,
    Subject,
)
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.prefault import Prefault
from workers.kv_transfer.recovery import Choice, Measured, Plan, Way
from workers.kv_transfer.source import Broken, SourceSession
from workers.kv_transfer.target import TargetSession
from workers.kv_transfer.transport import Sweeping, Transport
from workers.pb import worker_pb2 as pb
from workers.peers import Peers
from workers.prefix_export import PrefixExporter
from workers.prefix_pull import PrefixPuller
from workers.request import HandoffReport, Request
from workers.runner import BLOCK_SIZE, Sampled
from workers.status import Role, WorkerAddress
from workers.stepping.result import BlocksFilled, LayersFilled, Prefilled, PrefixHeld, PullWanted, TransferWanted
from workers.tracing import Span, start_span
from workers.wire_handoff import down_from_pb, up_to_pb
from workers.wire_seal import Sealer, verified

log = logging.getLogger(__name__)

CLOSE_S = 5.0


@dataclass(slots=True)
class Identity:
    """Who the worker is now; the worker owns it, others read."""

    worker_id: str
    role: Role
    generation: int
    target: str = ""
    is_draining: bool = False
    """Takes no new work."""
    is_rebuilding: bool = False
    """A rank is missing; nothing new is accepted."""

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(self.worker_id, self.generation, self.target)


class Transfers:
    """Owns every running handoff. Used from the event loop only; `post` reaches the engine thread.

    `transports` are best first. `exporters` says who opens an export of which kind of subject; more may be added (`export`).
    """

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        memory: KvMemory,
        fingerprint: str,
        transports: Mapping[str, Transport],
        post: Callable[[Command], None],
        new_sequence_id: Callable[[], int],
    ) -> None:
        self._config = config
        self._identity = identity
        self._memory = memory
        self._prefault = Prefault(memory)
        self._fingerprint = fingerprint
        self._transports = transports
        self._post = post
        self._peers = Peers()
        self._host = socket.gethostname()
        self._prompts = PromptExporter(post, new_sequence_id)
        self._prefixes = PrefixExporter(post, new_sequence_id)
        self._exporters: dict[type, Exporter] = {Prompt: self._prompts, Prefix: self._prefixes}
        self._puller = PrefixPuller(self.receive, memory.layout, post, config.transfer_timeout_s)
        self._sources: dict[SourceDriver, asyncio.Task[None]] = {}
        self._targets: dict[TargetDriver, asyncio.Task[None]] = {}
        self._fetches: dict[int, asyncio.Task[None]] = {}
        self.counters: Counter[str] = Counter({f"recovery_{way}": 0 for way in Way})
        self._puller.counters = self._prefixes.counters = self.counters
        self.measured = Measured()

    @property
    def num_running(self) -> int:
        """Handoffs under way at either end; 0 when idle, or something leaks."""
        return len(self._sources) + len(self._targets) + len(self._fetches) + self._puller.num_running

    # ---- as the sender ----

    def export(self, subject: type, exporter: Exporter) -> None:
        """From now on subjects of this kind are served."""
        self._exporters[subject] = exporter

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
            self.counters["handoffs_refused"] += 1
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
            session, self._memory, self._transports, opening.target, transfer_id, self._identity.generation
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

    def fail_sources(self, message: str) -> None:
        """Gives up everything that is handed over from here."""
        for driver in self._sources:
            driver.post(Broken(message, is_ours=True))

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
        _log_failure(task)
        self.counters["handoffs_sent" if not driver.reason else "handoffs_not_taken"] += 1
        self.counters["handoff_sent_bytes"] += driver.sent_bytes
        if driver.reason:
            log.warning("%s gave a handoff up: %s", self._identity.worker_id, driver.reason)

    def filled(self, event: BlocksFilled) -> None:
        self._prompts.filled(event)

    def layers_filled(self, event: LayersFilled) -> None:
        self._prompts.layers_filled(event)

    def prefilled(self, event: Prefilled) -> None:
        self._prompts.prefilled(event)

    def held(self, event: PrefixHeld) -> None:
        self._prefixes.held(event)

    def source_failed(self, sequence_id: int, message: str) -> bool:
        """The engine refused or failed a prompt; True when it was computed for another worker."""
        return self._prompts.failed(sequence_id, message)

    # ---- as the receiver ----

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
        )
        session = TargetSession(cut, opening, self._config.transfer_timeout_s, plan=plan)
        driver = TargetDriver(session, self._memory, self._transports, source, blocks, uuid.uuid4().hex)
        fresh = self._prefault.fresh(blocks[first_block:])
        if fresh:
            asyncio.get_running_loop().run_in_executor(None, self._prefault.back, fresh)
        stub = await self._peers.stub(source.target)
        task = asyncio.create_task(driver.run(stub), name=f"target-{source.worker_id}")
        self._targets[driver] = task
        task.add_done_callback(lambda ended: self._target_ended(driver, ended))
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

    def _target_ended(self, driver: TargetDriver, task: asyncio.Task[None]) -> None:
        self._targets.pop(driver)
        _log_failure(task)

    async def _forget(self, source: WorkerAddress) -> None:
        """Its successor is to be dialled afresh."""
        await self._peers.forget(source.target)
        for transport in self._transports.values():
            await transport.forget(source.worker_id)

    def fetch(
        self,
        wanted: TransferWanted,
        request: Request,
        candidates: tuple[WorkerAddress, ...],
        deadline_s: float = math.inf,
    ) -> None:
        """Has the prompt computed by one of the candidates; the engine hears Landed or TransferLost.

        `deadline_s` (of time.monotonic) is when the first token is due: it decides how to go on after a fault.
        """
        num_tokens = len(request.prompt_token_ids) - wanted.first_block * BLOCK_SIZE
        plan = Plan(self.measured, deadline_s, num_tokens, tuple(c.worker_id for c in candidates))
        fetching = self._fetch(wanted, request, candidates, plan)
        task = asyncio.create_task(fetching, name=f"fetch-{wanted.sequence_id}")
        self._fetches[wanted.sequence_id] = task
        task.add_done_callback(lambda _: self._fetched(wanted.sequence_id, task))

    def take_over(self, wanted: TransferWanted, running: Migration) -> None:
        """Has a running sequence's blocks and state sent here; the engine hears MovedIn or TransferLost."""
        task = asyncio.create_task(self._take_over(wanted, running), name=f"take-over-{wanted.sequence_id}")
        self._fetches[wanted.sequence_id] = task
        task.add_done_callback(lambda _: self._fetched(wanted.sequence_id, task))

    async def _take_over(self, wanted: TransferWanted, running: Migration) -> None:
        me, source = self._identity.worker_id, running.source
        try:
            handoff = await self.receive(source, Running(running.request_id), wanted.first_block, wanted.blocks)
        except TransferFailed as error:
            self.counters["migrations_in_failed"] += 1
            log.warning("%s could not take over %s from %s: %s", me, running.request_id, source.worker_id, error)
            self._post(TransferLost(wanted.sequence_id, HandoffReport(me, me, "local")))
            return
        done = handoff.done
        if not isinstance(done, SequenceMoved):
            raise InvariantViolated(f"a running sequence ended with {type(done).__name__}")
        self._post(MovedIn(wanted.sequence_id, done.known_token_ids, done.num_computed))
        self.counters["migrations_in"] += 1
        self.counters["migrated_bytes"] += handoff.kv_bytes

    def _fetched(self, sequence_id: int, task: asyncio.Task[None]) -> None:
        """However a fetch ended, nothing writes into its blocks any more (`receive`), and the engine must hear of it."""
        self._fetches.pop(sequence_id)
        if task.cancelled() or task.exception() is not None:
            me = self._identity.worker_id
            self._post(TransferLost(sequence_id, HandoffReport(me, me, "local")))
            _log_failure(task)

    def decline(self, wanted: TransferWanted) -> None:
        """Nobody waits for this prompt any more and no transfer was begun."""
        me = self._identity.worker_id
        self._post(TransferLost(wanted.sequence_id, HandoffReport(me, me, "local")))

    def abandon(self, sequence_id: int) -> None:
        """The request was cancelled: stop the transfer, then the engine hears TransferLost and frees the blocks."""
        task = self._fetches.get(sequence_id)
        if task is not None:
            task.cancel()
        self._puller.abandon(sequence_id)

    def pull(self, wanted: PullWanted) -> None:
        """Has a peer send prefix blocks that it holds, if that is worth it; the engine hears Pulled."""
        self._puller.pull(wanted)

    async def _fetch(
        self, wanted: TransferWanted, request: Request, candidates: tuple[WorkerAddress, ...], plan: Plan
    ) -> None:
        me = self._identity.worker_id
        report = HandoffReport(me, me, "local", attempts=0)
        for source in candidates:
            report = replace(report, attempts=report.attempts + 1)
            plan.ask(source.worker_id, time.monotonic())
            attributes = {"source": source.worker_id, "target": me, "attempt": report.attempts}
            span = start_span("handoff", request.traceparent, attributes=attributes)
            subject = Prompt(replace(request, traceparent=span.traceparent), wanted.hint)
            fault = "cancelled"
            try:
                handoff = await self.receive(source, subject, wanted.first_block, wanted.blocks, plan)
            except HandoffFailed as error:
                fault = str(error)
                choice = plan.after_fault(time.monotonic())
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
        self.counters["local_prefills_after_failure"] += 1
        self._post(TransferLost(wanted.sequence_id, replace(report, attempts=report.attempts + 1)))

    def _lost(self, report: HandoffReport, error: HandoffFailed, choice: Choice) -> HandoffReport:
        self.counters["handoffs_failed"] += 1
        self.counters[f"recovery_{choice.way}"] += 1
        self.counters[f"recovery_{Way.NEXT_TRANSPORT}"] += error.degradations
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
        self.counters["handoffs_landed"] += 1
        self.counters[f"handoffs_landed_{handoff.transport}"] += 1
        self.counters["handoff_received_bytes"] += handoff.kv_bytes
        self.counters[f"recovery_{Way.NEXT_TRANSPORT}"] += handoff.degradations
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

    async def tick(self) -> None:
        """Now and then: lets go of what dead peers left behind."""
        for transport in self._transports.values():
            if isinstance(transport, Sweeping):
                await transport.sweep()

    async def close(self) -> None:
        """Ends every transfer and the transports."""
        for task in self._fetches.values():
            task.cancel()
        self._puller.close()
        for driver in self._targets:
            driver.cancel("the worker is stopping")
        for source in self._sources:
            source.post(Broken("the worker is stopping", is_ours=True))
        tasks = {*self._fetches.values(), *self._targets.values(), *self._sources.values()}
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        await self._peers.close()
        for transport in self._transports.values():
            await transport.close()


def _log_failure(task: asyncio.Task[None]) -> None:
    """A driver that raised has cleaned up behind itself; that it raised is our fault and must be seen."""
    if not task.cancelled() and task.exception() is not None:
        log.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception())


async def _until_done(outcome: asyncio.Future[Handoff]) -> None:
    """However often the waiting task is cancelled: the blocks may not be given away before."""
    while not outcome.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({outcome})
    outcome.exception()  # seen
