"""The worker's gRPC face: attaches routers, serves handoffs, switches roles. Translates; decides nothing about batches."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

import grpc

from workers.client import Cancel, DumpRequest, Hello, Migration, Submit
from workers.config import WorkerConfig
from workers.engine_thread import Add, AddMigrant, CancelSequence, Command, DumpKv, ForgetCache, Report
from workers.errors import InvalidRequest, Refusal, Refused, StreamDamaged
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.messages import Running
from workers.kv_transfer.transport import Transport
from workers.migration import RunningExporter
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.request import Output, Request, error_output, refusal_output
from workers.request_trace import RequestTraces
from workers.router_session import RouterSession
from workers.scheduler.sequence import Kind
from workers.status import Load, ModelInfo, RankStatus, Role, WorkerAddress, WorkerStatus
from workers.transfers import Identity, Transfers
from workers.wire import frame_to_pb, router_message_from_pb, status_to_pb
from workers.wire_seal import Sealer, Unsealer, verified

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0
IDLE_CHECK_S = 0.2


@dataclass(frozen=True, slots=True)
class _Owner:
    """Whose sequence it is, what was asked for, and who is to compute its prompt or runs it so far."""

    session: RouterSession
    request: Request
    candidates: tuple[WorkerAddress, ...]
    migration: Migration | None


@dataclass(frozen=True, slots=True)
class Face:
    """What a worker of several ranks says of them in its status."""

    ranks: Callable[[], tuple[RankStatus, ...]] = tuple
    counters: Callable[[], tuple[tuple[str, float], ...]] = tuple


class WorkerServer(worker_pb2_grpc.WorkerServicer):
    """Connects routers, transfers and the engine thread. Everything here runs on one event loop.

    `post` hands a command to the engine thread; its reports come to `on_report`.
    """

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        model: ModelInfo,
        memory: KvMemory,
        transports: Mapping[str, Transport],
        post: Callable[[Command], None],
        on_role_change: Callable[[Role, int], None] | None = None,
        face: Face | None = None,
    ) -> None:
        self._face = face or Face()
        self._config = config
        self._identity = identity
        self._model = model
        self._memory = memory
        self._post = post
        self._on_role_change = on_role_change
        self.on_drain_change: Callable[[bool], None] | None = None
        self._changed = asyncio.Event()
        """Set at every report of the engine, for those who wait for the worker to be idle."""
        self._ids = itertools.count(1)
        self._traces = RequestTraces()
        self._owners: dict[int, _Owner] = {}
        self._routers: set[RouterSession] = set()
        self._load = Load(num_blocks=memory.layout.num_blocks, num_free_blocks=memory.layout.num_blocks)
        self._counters: tuple[tuple[str, float], ...] = ()
        self._num_held_blocks = 0
        self._is_stopping = False
        self.transfers = Transfers(config, identity, memory, model.fingerprint, transports, post, self._ids.__next__)
        self._running = RunningExporter(post, self._find, config.max_pause_s, self.transfers.counters)
        self.transfers.export(Running, self._running)

    def status(self) -> WorkerStatus:
        """The worker as it is now; `held_blocks` among the counters is 0 when idle."""
        extra = (
            ("held_blocks", float(self._num_held_blocks)),
            ("running_transfers", float(self.transfers.num_running)),
            *((name, float(value)) for name, value in sorted(self.transfers.counters.items())),
        )
        return WorkerStatus(
            worker_id=self._identity.worker_id,
            generation=self._identity.generation,
            role=self._identity.role,
            model=self._model,
            load=self._load,
            pid=os.getpid(),
            host=socket.gethostname(),
            kv_block_bytes=self._memory.layout.block_bytes,
            counters=self._counters + extra + self._face.counters(),
            is_draining=self._identity.is_draining,
            ranks=self._face.ranks(),
            is_rebuilding=self._identity.is_rebuilding,
        )

    def set_role(self, role: Role) -> WorkerStatus:
        """Switches at once: what runs here runs on to its end, what comes from now on meets the new role."""
        identity = self._identity
        if role is not identity.role:
            log.info("%s switches from %s to %s", identity.worker_id, identity.role, role)
            identity.role = role
            identity.generation += 1
            if self._on_role_change is not None:
                self._on_role_change(role, identity.generation)
        self._broadcast_status()
        return self.status()

    def set_draining(self, is_draining: bool, remember: bool = True) -> WorkerStatus:
        """From now on takes no new work, or takes it again; what runs here runs on, until routers move it.

        `remember`: the worker's owner is told, so that a restart does not undo it.
        """
        identity = self._identity
        if is_draining is not identity.is_draining:
            log.info("%s %s", identity.worker_id, "drains" if is_draining else "takes new work again")
            identity.is_draining = is_draining
            if remember and self.on_drain_change is not None:
                self.on_drain_change(is_draining)
        self._broadcast_status()
        return self.status()

    @property
    def is_idle(self) -> bool:
        """Holds no request, no block and no transfer."""
        return not (self._owners or self._num_held_blocks or self.transfers.num_running)

    async def wait_idle(self) -> None:
        """Until nothing runs here; looks again after each engine step, and now and then for transfers."""
        while not self.is_idle:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_CHECK_S):
                    await self._changed.wait()

    def suspend(self, reason: str) -> None:
        """A rank is lost: gives everything up that runs here, so that routers run it elsewhere; a new generation begins.

        Nothing is accepted until `resume`. What the prefix cache holds may be partly gone with the rank.
        """
        identity = self._identity
        if identity.is_rebuilding:
            return
        log.warning("%s suspends: %s", identity.worker_id, reason)
        identity.is_rebuilding = True
        identity.generation += 1
        if self._on_role_change is not None:
            self._on_role_change(identity.role, identity.generation)
        self._broadcast_status()
        self._give_up_all(Refusal.WORKER_LOST, f"{identity.worker_id} lost a rank: {reason}")
        self.transfers.fail_sources(reason)
        self._post(ForgetCache())

    def resume(self) -> None:
        """All ranks are there: work is accepted again, in the generation that began with `suspend`."""
        self._identity.is_rebuilding = False
        self._broadcast_status()

    # ---- reports of the engine thread ----

    def on_report(self, report: Report) -> None:
        """Distributes one engine step."""
        self._load, self._counters = report.load, report.counters
        self._num_held_blocks = report.num_held_blocks
        self._changed.set()
        self.transfers.measured.own_rate = report.prefill_rate
        result = report.result
        for sequence_id, output in result.outputs:
            self._deliver(sequence_id, output)
        for wanted in result.transfers:
            owner = self._owners.get(wanted.sequence_id)
            if owner is None:  # cancelled meanwhile
                self.transfers.decline(wanted)
            elif owner.migration is not None:
                self.transfers.take_over(wanted, owner.migration)
            else:
                # The prefill worker computes the prompt and its first token; a replay is the decode worker's business.
                due_s = self._traces.deadline_s(wanted.sequence_id)
                self.transfers.fetch(wanted, replace(owner.request, replay_token_ids=()), owner.candidates, due_s)
        for event in result.exports:
            self._running.hear(event)
        for pull in result.pulls:
            self.transfers.pull(pull)
        for sequence_id in result.abandoned:
            self.transfers.abandon(sequence_id)
        for held in result.held:
            self.transfers.held(held)
        for filled in result.filled:
            self.transfers.filled(filled)
        for prefilled in result.prefilled:
            self.transfers.prefilled(prefilled)
        for router in self._routers:
            router.add_load(report.load)
            if result.kv_event is not None:
                router.add_kv_event(result.kv_event)
            if router.needs_dump:
                self._post(DumpKv())

    def _deliver(self, sequence_id: int, output: Output) -> None:
        owner = self._owners.get(sequence_id)
        if owner is None:
            if output.finish_reason is not None:
                self.transfers.source_failed(sequence_id, output.message)
            return
        session = owner.session
        self._traces.said(sequence_id, output)
        session.add_output(output)
        if output.finish_reason is not None:
            del self._owners[sequence_id]
            session.sequences.pop(output.request_id, None)

    # ---- gRPC ----

    async def Attach(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkerFrame]:
        """One router's stream. When it ends, its requests end."""
        unsealer, sealer = Unsealer(), Sealer()
        messages = verified(request_iterator, unsealer)
        try:
            first = await anext(messages, None)
        except StreamDamaged as error:
            await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
            return
        hello = router_message_from_pb(first) if first is not None else None
        if not isinstance(hello, Hello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream begins with Hello")
            return
        session = RouterSession(hello.router_id, self._config.max_pending_frames * self._config.max_num_seqs)
        self._routers.add(session)
        self._post(DumpKv())
        session.add_status(self.status())
        reader = asyncio.create_task(self._read(session, messages))
        try:
            while not session.has_ended:
                frame = await session.next_frame(self._identity.generation)
                if session.is_overrun:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the router does not keep up")
                message = frame_to_pb(frame)
                message.heard = unsealer.number
                yield sealer.seal(message)
        finally:
            reader.cancel()
            self._routers.discard(session)
            for sequence_id in session.sequences.values():
                self._forget(sequence_id)

    def _forget(self, sequence_id: int) -> None:
        """Nobody waits for it any more."""
        self._owners.pop(sequence_id, None)
        self._traces.ended(sequence_id, "cancelled")
        self._post(CancelSequence(sequence_id))

    async def _read(self, session: RouterSession, messages: AsyncIterator[pb.RouterMessage]) -> None:
        try:
            async for message in messages:
                try:
                    parsed = router_message_from_pb(message)
                except ValueError as error:
                    log.warning("%s sent a message that cannot be read: %s", session.router_id, error)
                    continue
                match parsed:
                    case Submit():
                        self._submit(session, parsed)
                    case Cancel(request_id):
                        sequence_id = session.sequences.pop(request_id, None)
                        if sequence_id is not None:
                            self._forget(sequence_id)
                    case DumpRequest():
                        self._post(DumpKv())
                    case Hello():
                        log.warning("%s said hello twice", session.router_id)
        except StreamDamaged as error:
            log.warning("the stream of %s ends: %s", session.router_id, error)
        finally:
            session.close()

    def _submit(self, session: RouterSession, submit: Submit) -> None:
        request = submit.request
        try:
            self._check_submit(session, submit)
        except (InvalidRequest, Refused) as error:
            session.add_output(refusal_output(request, error))
            return
        sequence_id = next(self._ids)
        candidates = tuple(c for c in submit.prefill_workers if c.worker_id != self._identity.worker_id)
        self._owners[sequence_id] = _Owner(session, request, candidates, submit.migration)
        self._traces.submitted(sequence_id, submit)
        session.sequences[request.request_id] = sequence_id
        if submit.migration is not None:
            self._post(AddMigrant(sequence_id, request))
        else:
            self._post(Add(sequence_id, request, Kind.TARGET if candidates else Kind.LOCAL, submit.prefix))

    def _find(self, request_id: str) -> int | None:
        """The sequence of that name on the wire, whichever router it belongs to; None if it is not exactly one."""
        found = [s.sequences[request_id] for s in self._routers if request_id in s.sequences]
        return found[0] if len(found) == 1 else None

    def _check_submit(self, session: RouterSession, submit: Submit) -> None:
        me = self._identity
        if self._is_stopping:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} is stopping")
        if me.is_draining:
            raise Refused(Refusal.DRAINING, f"{me.worker_id} drains")
        if me.is_rebuilding:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} waits for a rank")
        if not me.role.can_decode:
            raise Refused(Refusal.WRONG_ROLE, f"{me.worker_id} is a {me.role} worker")
        if submit.generation != me.generation:
            raise Refused(
                Refusal.STALE_GENERATION, f"{me.worker_id} is in generation {me.generation}, not {submit.generation}"
            )
        if submit.request.request_id in session.sequences:
            raise InvalidRequest(f"request {submit.request.request_id} is running already")

    async def Handoff(
        self, request_iterator: AsyncIterator[pb.HandoffDown], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.HandoffUp]:
        messages = self.transfers.serve(request_iterator)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    async def SetRole(self, request: pb.SetRoleRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        try:
            role = Role(request.role)
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no role is called {request.role!r}")
        if request.generation not in (0, self._identity.generation):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{self._identity.worker_id} is in generation {self._identity.generation}, not {request.generation}",
            )
        return status_to_pb(self.set_role(role))

    async def SetDraining(self, request: pb.SetDrainingRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        if request.generation not in (0, self._identity.generation):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{self._identity.worker_id} is in generation {self._identity.generation}, not {request.generation}",
            )
        return status_to_pb(self.set_draining(request.is_draining))

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        return status_to_pb(self.status())

    # ---- life ----

    def _broadcast_status(self) -> None:
        status = self.status()
        for router in self._routers:
            router.add_status(status)

    async def tick_forever(self) -> None:
        """Tells every router about once a second that the worker lives."""
        while True:
            await asyncio.sleep(STATUS_INTERVAL_S)
            await self.transfers.tick()
            self._broadcast_status()

    async def close(self) -> None:
        """Refuses what comes, ends what runs with SHUTTING_DOWN so that routers run it elsewhere."""
        self._is_stopping = True
        self._give_up_all(Refusal.SHUTTING_DOWN, f"{self._identity.worker_id} is stopping")
        for router in self._routers:
            router.close()
        await self.transfers.close()

    def _give_up_all(self, refusal: Refusal, message: str) -> None:
        for sequence_id, owner in list(self._owners.items()):
            self._deliver(sequence_id, error_output(owner.request, refusal, message))
            self._post(CancelSequence(sequence_id))
