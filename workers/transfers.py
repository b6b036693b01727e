"""All KV handoffs of one worker, in both directions: accepts them from decode workers and fetches prompts from prefill workers."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from workers.config import WorkerConfig
from workers.engine import BlocksFilled, Prefilled, TransferWanted
from workers.engine_thread import Add, CancelSequence, Command, Landed, TransferLost
from workers.errors import Refusal, TransferFailed
from workers.handoff_source import SourceDriver
from workers.handoff_target import Handoff, PoolMaps, TargetDriver
from workers.kv_transfer.copier import same_shape
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.messages import HandoffAccepted, HandoffRefused, OpenHandoff, PrefillDone
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.source import Broken, Filled, SourceSession
from workers.kv_transfer.target import TargetSession
from workers.pb import worker_pb2 as pb
from workers.peers import Peers
from workers.request import HandoffReport, Request
from workers.runner import BLOCK_SIZE, Sampled
from workers.scheduler.sequence import Kind
from workers.status import Role, WorkerAddress
from workers.wire_handoff import down_from_pb, up_to_pb

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Identity:
    """Who the worker is now; the worker owns it, others read."""

    worker_id: str
    role: Role
    generation: int
    target: str = ""
    is_rebuilding: bool = False
    """A rank is missing; nothing new is accepted."""

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(self.worker_id, self.generation, self.target)


class Transfers:
    """Owns every running handoff. Used from the event loop only; `post` reaches the engine thread."""

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        memory: KvMemory,
        fingerprint: str,
        post: Callable[[Command], None],
        new_sequence_id: Callable[[], int],
    ) -> None:
        self._config = config
        self._identity = identity
        self._memory = memory
        self._fingerprint = fingerprint
        self._post = post
        self._new_sequence_id = new_sequence_id
        self._peers = Peers()
        self._pools = PoolMaps()
        self._sources: dict[int, tuple[SourceDriver, Cut]] = {}
        self._targets: dict[int, TargetDriver] = {}
        self._fetching: set[int] = set()
        self._cancelled: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.counters: Counter[str] = Counter()

    @property
    def num_running(self) -> int:
        return len(self._sources) + len(self._tasks)

    # ---- as the prefill worker ----

    async def serve(self, incoming: AsyncIterator[pb.HandoffDown]) -> AsyncIterator[pb.HandoffUp]:
        """Answers one Handoff stream."""
        try:
            first = await asyncio.wait_for(anext(incoming), self._config.transfer_timeout_s)
            opening = down_from_pb(first)
        except (StopAsyncIteration, TimeoutError, TransferFailed) as error:
            log.warning("a handoff stream ended before it began: %r", error)
            return
        generation = self._identity.generation
        refused = self._check_opening(opening, first.generation)
        if refused is not None or not isinstance(opening, OpenHandoff):
            refused = refused or HandoffRefused(Refusal.INVALID, "a handoff begins with OpenHandoff")
            self.counters["handoffs_refused"] += 1
            yield up_to_pb(first.transfer_id, generation, refused)
            return
        request = opening.request
        num_blocks = -(-len(request.prompt_token_ids) // BLOCK_SIZE) - opening.first_block
        cut = Cut(self._memory.layout, opening.first_block, num_blocks)
        common = tuple(t for t in opening.transports if t in self._config.transports)
        accepted = HandoffAccepted(common, self._memory.layout, self._memory.handle if "shm" in common else None)
        session = SourceSession(cut, accepted, self._config.transfer_timeout_s, self._config.transfer_window_bytes)
        sequence_id = self._new_sequence_id()
        driver = SourceDriver(
            session,
            self._memory,
            first.transfer_id,
            generation,
            opening.target.generation,
            start_prefill=lambda: self._post(Add(sequence_id, request, Kind.SOURCE)),
            release=lambda reason: self._release_source(sequence_id, reason),
        )
        self._sources[sequence_id] = (driver, cut)
        async for message in driver.run(incoming):
            yield message

    def filled(self, event: BlocksFilled) -> None:
        entry = self._sources.get(event.sequence_id)
        if entry is not None:
            entry[0].post(Filled(event.blocks, event.num_filled))

    def prefilled(self, event: Prefilled) -> None:
        entry = self._sources.get(event.sequence_id)
        if entry is None:
            return
        driver, cut = entry
        assert event.sampled.token_id is not None
        driver.post(
            PrefillDone(
                event.sampled.token_id, event.sampled.logprob, cut.num_pieces, event.cached_tokens, event.prefill_s
            )
        )

    def source_failed(self, sequence_id: int, message: str) -> bool:
        """The engine refused or failed a prompt; True when it was one of ours."""
        entry = self._sources.get(sequence_id)
        if entry is not None:
            entry[0].post(Broken(message))
        return entry is not None

    def fail_sources(self, message: str) -> None:
        """Gives up every prompt that is computed here for others."""
        for driver, _ in self._sources.values():
            driver.post(Broken(message))

    def _release_source(self, sequence_id: int, reason: str) -> None:
        driver, _ = self._sources.pop(sequence_id)
        self._post(CancelSequence(sequence_id))
        self.counters["handoffs_sent" if not reason else "handoffs_not_taken"] += 1
        self.counters["handoff_sent_bytes"] += driver.sent_bytes
        if reason:
            log.warning("%s gave a prompt up: %s", self._identity.worker_id, reason)

    def _check_opening(self, opening: object, generation: int) -> HandoffRefused | None:
        if not isinstance(opening, OpenHandoff):
            return HandoffRefused(Refusal.INVALID, "a handoff begins with OpenHandoff")
        me = self._identity
        if opening.target.generation != generation:
            return HandoffRefused(Refusal.STALE_GENERATION, "the receiver contradicts itself about its generation")
        if opening.source_generation != me.generation:
            return HandoffRefused(
                Refusal.STALE_GENERATION,
                f"{me.worker_id} is in generation {me.generation}, not {opening.source_generation}",
            )
        if me.is_rebuilding:
            return HandoffRefused(Refusal.SHUTTING_DOWN, f"{me.worker_id} waits for a rank")
        if not me.role.can_prefill:
            return HandoffRefused(Refusal.WRONG_ROLE, f"{me.worker_id} is a {me.role} worker")
        if opening.model_fingerprint != self._fingerprint or not same_shape(opening.layout, self._memory.layout):
            return HandoffRefused(Refusal.INVALID, f"{me.worker_id} serves another model or KV layout")
        if not set(opening.transports) & set(self._config.transports):
            return HandoffRefused(Refusal.INVALID, f"no common transport: {self._config.transports} here")
        blocks = -(-len(opening.request.prompt_token_ids) // BLOCK_SIZE)
        if not 0 <= opening.first_block < max(blocks, 1):
            return HandoffRefused(Refusal.INVALID, "first_block is outside the prompt")
        return None

    # ---- as the decode worker ----

    def fetch(self, wanted: TransferWanted, request: Request, candidates: tuple[WorkerAddress, ...]) -> None:
        """Has the prompt computed by the first candidate that manages; the engine hears Landed or TransferLost."""
        self._fetching.add(wanted.sequence_id)
        task = asyncio.create_task(self._fetch(wanted, request, candidates), name=f"fetch-{wanted.sequence_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def decline(self, wanted: TransferWanted) -> None:
        """Nobody waits for this prompt any more and no transfer was begun."""
        me = self._identity.worker_id
        self._post(TransferLost(wanted.sequence_id, HandoffReport(me, me, "local")))

    def abandon(self, sequence_id: int) -> None:
        """The request was cancelled: stop the transfer, then the engine hears TransferLost and frees the blocks."""
        if sequence_id not in self._fetching:
            return
        self._cancelled.add(sequence_id)
        driver = self._targets.get(sequence_id)
        if driver is not None:
            driver.cancel()

    async def _fetch(self, wanted: TransferWanted, request: Request, candidates: tuple[WorkerAddress, ...]) -> None:
        me = self._identity.worker_id
        attempts = 0
        try:
            for source in candidates:
                if wanted.sequence_id in self._cancelled:
                    break
                attempts += 1
                try:
                    await self._fetch_from(source, wanted, request, attempts)
                except TransferFailed as error:
                    if wanted.sequence_id not in self._cancelled:
                        self.counters["handoffs_failed"] += 1
                        log.warning("%s could not fetch a prompt from %s: %s", me, source.worker_id, error)
                        await self._peers.forget(source.target)
                    continue
                return
            self.counters["local_prefills_after_failure"] += wanted.sequence_id not in self._cancelled
            report = HandoffReport(me, me, "local", attempts=attempts + 1)
            self._post(TransferLost(wanted.sequence_id, report))
        except BaseException:
            # Nothing is copying any more (TargetDriver.run waits), so the blocks may be used or freed.
            self._post(TransferLost(wanted.sequence_id, HandoffReport(me, me, "local", attempts=attempts + 1)))
            raise
        finally:
            self._fetching.discard(wanted.sequence_id)
            self._cancelled.discard(wanted.sequence_id)

    async def _fetch_from(self, source: WorkerAddress, wanted: TransferWanted, request: Request, attempts: int) -> None:
        layout = self._memory.layout
        cut = Cut(layout, wanted.first_block, len(wanted.blocks) - wanted.first_block)
        opening = OpenHandoff(
            target=self._identity.address,
            source_generation=source.generation,
            model_fingerprint=self._fingerprint,
            layout=layout,
            request=request,
            first_block=wanted.first_block,
            transports=self._config.transports,
        )
        session = TargetSession(cut, opening, self._config.transfer_timeout_s)
        driver = TargetDriver(session, self._memory, self._pools, wanted.blocks, uuid.uuid4().hex)
        self._targets[wanted.sequence_id] = driver
        try:
            stub = await self._peers.stub(source.target)
            await driver.run(stub, lambda handoff: self._landed(wanted, source, handoff, attempts))
        finally:
            del self._targets[wanted.sequence_id]

    def _landed(self, wanted: TransferWanted, source: WorkerAddress, handoff: Handoff, attempts: int) -> None:
        done = handoff.done
        self.counters["handoffs_landed"] += 1
        self.counters[f"handoffs_landed_{handoff.transport}"] += 1
        self.counters["handoff_received_bytes"] += handoff.kv_bytes
        report = HandoffReport(
            prefill_worker=source.worker_id,
            decode_worker=self._identity.worker_id,
            transport=handoff.transport,
            kv_bytes=handoff.kv_bytes,
            transfer_s=handoff.transfer_s,
            prefill_s=done.prefill_s,
            attempts=attempts,
        )
        sampled = Sampled(wanted.sequence_id, done.token_id, done.logprob)
        self._post(Landed(wanted.sequence_id, sampled, done.cached_tokens, report))

    def tick(self) -> None:
        """Now and then: lets go of what dead peers left behind."""
        self._pools.drop_dead()

    async def close(self) -> None:
        """Ends every transfer."""
        for driver in self._targets.values():
            driver.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
        await self._peers.close()
        self._pools.clear()
