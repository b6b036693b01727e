"""Runs the worker core on asyncio: carries events in and commands out, between routers, peers and the engine thread. Decides nothing.

Everything here runs on one event loop; the engine thread's reports come to it by way of that loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

from workers.config import WorkerConfig
from workers.engine.messages import AddMigrant, AddSequence, EngineCommand, LayersFilled, Report
from workers.kv_memory.memory import KvMemory
from workers.log_context import log_about
from workers.serving import events
from workers.serving.core import WorkerCore
from workers.serving.handoffs import Handoffs
from workers.serving.streams import Streams
from workers.serving.traces import RequestTraces
from workers.status import Identity, Load, ModelInfo, RankStatus, Role, WorkerStatus
from workers.tracing import is_collected
from workers.transports.contract import Transport
from workers.trust.credentials import Credentials

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 1.0
IDLE_CHECK_S = 0.2
RETRY_S = 0.5
"""Between a tick that failed and the next."""


@dataclass(frozen=True, slots=True)
class RanksView:
    """What a worker of several ranks says of them in its status."""

    ranks: Callable[[], tuple[RankStatus, ...]] = tuple
    counters: Callable[[], tuple[tuple[str, float], ...]] = tuple


class WorkerDriver:
    """Connects routers, handoffs and the engine thread through the core.

    `post` hands a command to the engine thread, which may have no room for a new sequence (False); what it reports comes to `on_report` and `on_layers`. `clock` is
    time.monotonic, or a virtual one that the event loop goes by as well.
    """

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        model: ModelInfo,
        memory: KvMemory,
        transports: Mapping[str, Transport],
        post: Callable[[EngineCommand], bool],
        clock: Callable[[], float],
        on_role_change: Callable[[Role, int], None] | None = None,
        ranks: RanksView | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self._identity = identity
        self._model = model
        self._block_bytes = memory.layout.block_bytes
        self._max_num_seqs = config.max_num_seqs
        self._max_batch_tokens = config.max_batch_tokens
        self._ranks = ranks or RanksView()
        self._post = post
        self._clock = clock
        self._on_role_change = on_role_change
        self.on_drain_change: Callable[[bool], None] | None = None
        self._changed = asyncio.Event()
        """Set at every report of the engine, for those who wait for the worker to be idle."""
        observer = RequestTraces(identity.worker_id) if is_collected() else None
        self._core = WorkerCore(config, identity, memory.layout, model.fingerprint, self._describe, observer)
        self.streams = Streams(self._handle, config.max_routers)
        self._handoffs = Handoffs(
            config,
            identity,
            memory,
            model.fingerprint,
            transports,
            self._core.counters,
            clock,
            self._handle,
            credentials,
        )
        self.serving = self._handoffs.transfers.serving
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self._is_closed = False

    # ---- the loop around the core ----

    def _handle(self, event: events.Event) -> None:
        """Whoever brings it: what comes of it may be about other requests, and later about none."""
        before = log_about({})
        try:
            for command in self._core.handle(event, self._clock()):
                self._execute(command)
        finally:
            self._set_timer()
            log_about(before)

    def _execute(self, command: events.Command) -> None:
        match command:
            case events.WriteFrame(session, frame):
                self.streams.write(session, frame)
            case events.Post(engine_command):
                if not self._post(engine_command):
                    assert isinstance(engine_command, AddSequence | AddMigrant)
                    asyncio.get_running_loop().call_soon(self._handle, events.NotAdded(engine_command.sequence_id))
            case events.Feed():
                self._handoffs.feed(command)
            case events.Receive():
                self._handoffs.receive(command)
            case events.StopReceiving(sequence_id):
                self._handoffs.stop_receiving(sequence_id)
            case events.AcceptHandoff() | events.RefuseHandoff():
                self._handoffs.answer(command)
            case events.FailHandoffs(reason):
                self.serving.fail_all(reason)
            case events.EndStream(session):
                self.streams.end(session)
            case events.CutStream(session, reason):
                self.streams.cut(session, reason)
            case events.TellRole(role, generation):
                if self._on_role_change is not None:
                    self._on_role_change(role, generation)
            case events.TellDrain(is_draining):
                if self.on_drain_change is not None:
                    self.on_drain_change(is_draining)
            case _:
                assert_never(command)

    def _set_timer(self) -> None:
        """Has the core woken when it next wants to be."""
        due_s = self._core.next_due_s
        if self._is_closed or (self._timer is not None and due_s == self._timer_due_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due_s = due_s
        delay_s = max(0.0, due_s - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        try:
            self._handle(events.Tick())
        except Exception:
            log.exception("a tick could not be handled")
            if self._timer is not None:  # what is due now may fail again
                self._timer.cancel()
                self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._tick)

    # ---- the engine thread ----

    def on_report(self, report: Report) -> None:
        """What a step brought."""
        self._handle(events.StepReported(report))
        self._changed.set()

    def on_layers(self, layers: LayersFilled) -> None:
        """In mid-step: layers of a prompt for another worker."""
        self._handle(events.LayersReported(layers))

    # ---- what the worker is ----

    def status(self) -> WorkerStatus:
        """The worker as it is now; `held_blocks` among the counters is 0 when idle."""
        return self._core.status()

    def _describe(self, load: Load, engine_counters: tuple[tuple[str, float], ...]) -> WorkerStatus:
        me, core = self._identity, self._core
        extra = (
            ("held_blocks", float(core.num_held_blocks)),
            ("running_transfers", float(self._handoffs.num_running)),
            *((name, float(value)) for name, value in sorted(core.counters.items())),
        )
        return WorkerStatus(
            worker_id=me.worker_id,
            generation=me.generation,
            role=me.role,
            model=self._model,
            load=load,
            pid=os.getpid(),
            host=socket.gethostname(),
            kv_block_bytes=self._block_bytes,
            counters=engine_counters + extra + self._ranks.counters(),
            is_draining=me.is_draining,
            ranks=self._ranks.ranks(),
            max_num_seqs=self._max_num_seqs,
            max_batch_tokens=self._max_batch_tokens,
            is_rebuilding=me.is_rebuilding,
        )

    def set_role(self, role: Role) -> WorkerStatus:
        """Switches at once: what runs here runs on to its end, what comes from now on meets the new role."""
        self._handle(events.SwitchRole(role))
        return self.status()

    def set_draining(self, is_draining: bool, remember: bool = True) -> WorkerStatus:
        """From now on takes no new work, or takes it again; what runs here runs on, until routers move it.

        `remember`: the worker's owner is told, so that a restart does not undo it.
        """
        self._handle(events.SetDrain(is_draining, remember))
        return self.status()

    def suspend(self, reason: str) -> None:
        """A rank is lost: gives everything up that runs here, so that routers run it elsewhere; a new generation begins.

        Nothing is accepted until `resume`.
        """
        self._handle(events.Suspend(reason))

    def resume(self) -> None:
        """All ranks are there: work is accepted again, in the generation that began with `suspend`."""
        self._handle(events.Resumed())

    @property
    def is_idle(self) -> bool:
        """Holds no request, no block and no transfer."""
        return self._core.is_idle and not self._handoffs.num_running

    async def wait_idle(self) -> None:
        """Until nothing runs here; looks again after each engine step, and now and then for transfers."""
        while not self.is_idle:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_CHECK_S):
                    await self._changed.wait()

    # ---- life ----

    def start(self) -> None:
        """From now on routers hear of the worker as time passes."""
        self._tick()

    async def sweep_forever(self) -> None:
        """About once a second lets go of what dead peers left behind."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            try:
                await self._handoffs.transfers.tick()
            except Exception:
                log.exception("what dead peers left behind could not be let go")

    async def close(self) -> None:
        """Refuses what comes, ends what runs with SHUTTING_DOWN so that routers run it elsewhere."""
        self._handle(events.Close())
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._handoffs.close()
