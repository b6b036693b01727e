"""The worker's gRPC face: attaches routers, serves handoffs, switches roles. Translates; decides nothing about batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

import grpc

from workers.config import WorkerConfig
from workers.engine_thread import Command, ForgetCache, Report
from workers.errors import Refusal
from workers.handoff.migration import RunningExporter
from workers.handoff.transfers import Transfers
from workers.identity import Identity
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.messages import Running
from workers.kv_transfer.transport import Transport
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.reception import Reception
from workers.router_streams import RouterStreams
from workers.status import Load, ModelInfo, RankStatus, Role, WorkerStatus
from workers.stepping.result import TransferWanted
from workers.wire import status_to_pb

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0
IDLE_CHECK_S = 0.2


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
        clock: Callable[[], float],
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
        self._requests = Reception(identity, post, clock)
        max_pending_outputs = config.max_pending_frames * config.max_num_seqs
        self._routers = RouterStreams(identity, self._requests, self.status, post, max_pending_outputs)
        self._load = Load(num_blocks=memory.layout.num_blocks, num_free_blocks=memory.layout.num_blocks)
        self._counters: tuple[tuple[str, float], ...] = ()
        self._num_held_blocks = 0
        new_sequence_id = self._requests.new_sequence_id
        self.transfers = Transfers(
            config, identity, memory, model.fingerprint, transports, post, new_sequence_id, clock
        )
        self._running = RunningExporter(post, self._requests.find, config.max_pause_s, self.transfers.counters)
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
        self._routers.tell_status()
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
        self._routers.tell_status()
        return self.status()

    @property
    def is_idle(self) -> bool:
        """Holds no request, no block and no transfer."""
        return self._requests.is_empty and not (self._num_held_blocks or self.transfers.num_running)

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
        self._routers.tell_status()
        self._requests.give_up_all(Refusal.WORKER_LOST, "the worker that ran this request lost a rank")
        self.transfers.serving.fail_all(reason)
        self._post(ForgetCache())

    def resume(self) -> None:
        """All ranks are there: work is accepted again, in the generation that began with `suspend`."""
        self._identity.is_rebuilding = False
        self._routers.tell_status()

    # ---- reports of the engine thread ----

    def on_report(self, report: Report) -> None:
        """Distributes one engine step."""
        self._load, self._counters = report.load, report.counters
        self._num_held_blocks = report.num_held_blocks
        self._changed.set()
        self.transfers.fetches.measured.own_rate = report.prefill_rate
        result = report.result
        for sequence_id, output in result.outputs:
            if not self._requests.deliver(sequence_id, output) and output.finish_reason is not None:
                self.transfers.prompts.failed(sequence_id, output.message)
        for wanted in result.transfers:
            self._find_source(wanted)
        for event in result.exports:
            self._running.hear(event)
        for pull in result.pulls:
            self.transfers.puller.pull(pull)
        for sequence_id in result.abandoned:
            self.transfers.abandon(sequence_id)
        for held in result.held:
            self.transfers.prefixes.held(held)
        for filled in result.filled:
            self.transfers.prompts.filled(filled)
        for prefilled in result.prefilled:
            self.transfers.prompts.prefilled(prefilled)
        self._routers.tell_step(report.load, result)

    def _find_source(self, wanted: TransferWanted) -> None:
        owner = self._requests.owner(wanted.sequence_id)
        if owner is None:  # cancelled meanwhile
            self.transfers.fetches.decline(wanted.sequence_id)
        elif owner.migration is not None:
            self.transfers.fetches.take_over(wanted, owner.migration)
        else:
            # The prefill worker computes the prompt and its first token; a replay is the decode worker's business.
            request, due_s = replace(owner.request, replay_token_ids=()), self._requests.deadline_s(wanted.sequence_id)
            self.transfers.fetches.fetch(wanted, request, owner.candidates, due_s)

    # ---- gRPC ----

    async def Attach(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkerFrame]:
        messages = self._routers.serve(request_iterator, context)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    async def Handoff(
        self, request_iterator: AsyncIterator[pb.HandoffDown], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.HandoffUp]:
        messages = self.transfers.serving.serve(request_iterator)
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
        await self._require_generation(request.generation, context)
        return status_to_pb(self.set_role(role))

    async def SetDraining(self, request: pb.SetDrainingRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        await self._require_generation(request.generation, context)
        return status_to_pb(self.set_draining(request.is_draining))

    async def _require_generation(self, generation: int, context: grpc.aio.ServicerContext) -> None:
        """0 stands for whichever it is."""
        me = self._identity
        if generation not in (0, me.generation):
            text = f"{me.worker_id} is in generation {me.generation}, not {generation}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        return status_to_pb(self.status())

    # ---- life ----

    async def tick_forever(self) -> None:
        """Tells every router about once a second that the worker lives."""
        while True:
            await asyncio.sleep(STATUS_INTERVAL_S)
            try:
                await self.transfers.tick()
            except Exception:
                log.exception("what dead peers left behind could not be let go")
            self._routers.tell_status()

    async def close(self) -> None:
        """Refuses what comes, ends what runs with SHUTTING_DOWN so that routers run it elsewhere."""
        self._requests.close()
        self._routers.close()
        await self.transfers.close()
