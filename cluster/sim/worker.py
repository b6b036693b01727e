"""One simulated worker process: the product's worker core and engine, with loops around them in virtual time. Decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, assert_never

from cluster.sim.core_loop import CoreLoop
from cluster.sim.engine_loop import EngineLoop
from cluster.sim.handoff_source import Sending, refuse
from cluster.sim.handoff_target import Receiving
from cluster.sim.model import BytelessMemory, info_of, layout_of
from cluster.sim.network import Network, Pipe
from cluster.sim.product import (
    Handoff,
    HandoffFailed,
    Identity,
    LayersFilled,
    Load,
    OpenHandoff,
    Report,
    Role,
    WorkerConfig,
    WorkerCore,
    WorkerFrame,
    WorkerStatus,
    first_generation,
    source_end,
    worker_events,
)
from cluster.sim.profiles.profile import Profile
from cluster.sim.timeline import Timeline, Timer

if TYPE_CHECKING:
    from cluster.sim.router import SimRouter


class World(Protocol):
    """What a worker finds around it."""

    timeline: Timeline
    network: Network
    profile: Profile

    def worker_at(self, target: str) -> SimWorker | None: ...

    def role_changed(self, worker: SimWorker, role: Role, generation: int) -> None: ...

    def drain_changed(self, worker: SimWorker, is_draining: bool) -> None: ...


class Stream:
    """An Attach stream between a router and a worker; each end closes it for itself."""

    __slots__ = ("connection", "down", "heard", "router", "session", "up", "worker")

    def __init__(self, router: SimRouter, worker: SimWorker, connection: int, network: Network) -> None:
        self.router = router
        self.worker = worker
        self.connection = connection
        self.session = 0
        self.heard = (0, 0)
        """The last of the worker's steps under way that the router has learnt from."""
        self.down = Pipe(network, router.name, worker.name, self._damaged_below)
        self.up = Pipe(network, worker.name, router.name, self._damaged_above)

    def _damaged_below(self, reason: str) -> None:
        self.worker.stream_broke(self)
        self.router.stream_broke(self, reason)

    def _damaged_above(self, reason: str) -> None:
        self._damaged_below(reason)


class SimWorker(CoreLoop[worker_events.Event, worker_events.Command]):
    """A process from its start to its end; a restart is another one of the same name."""

    core: WorkerCore

    def __init__(
        self,
        world: World,
        config: WorkerConfig,
        name: str,
        role: Role,
        start_count: int,
        num_parts: int,
        max_leap_s: float,
        leap_until: Callable[[float], float],
        hang_ups: Mapping[int, int],
    ) -> None:
        super().__init__(world.timeline)
        self.world = world
        self.config = config
        self.name = name
        self.identity = Identity(name, role, first_generation(start_count), f"{name}:{start_count}")
        self.model = info_of(world.profile)
        self.layout = layout_of(world.profile, num_parts)
        self.latency_s = world.profile.control_latency_s
        self._pid = start_count
        self._frozen: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
        self.core = WorkerCore(config, self.identity, self.layout, self.model.fingerprint, self._describe)
        self.memory = BytelessMemory(self.layout)
        self.loop = EngineLoop(
            world.profile,
            config,
            self.memory,
            name,
            world.timeline,
            self._on_report,
            self._on_layers,
            max_leap_s,
            leap_until,
            hang_ups,
        )
        self.streams: dict[int, Stream] = {}
        self.receiving: dict[int, Receiving] = {}
        self.sending: dict[int, Sending] = {}
        self.last_report_s = 0.0
        self._sessions = itertools.count(1)
        self._transfers = itertools.count(1)
        self._answer: worker_events.AcceptHandoff | worker_events.RefuseHandoff | None = None
        self._timer: Timer | None = None
        self._counted = -1
        self._counters: tuple[tuple[str, float], ...] = ()
        """Those of the core, as they were when their sum was that."""

    # ---- life ----

    def start(self) -> None:
        self.handle(worker_events.Tick())

    def kill(self) -> None:
        """The process is gone at once; whoever was connected finds out."""
        self.is_dead = True
        self._frozen = None
        self.loop.stop()
        if self._timer is not None:
            self._timer.cancel()
        for stream in self.streams.values():
            stream.up.is_closed = stream.down.is_closed = True
            self.world.timeline.after(self.latency_s, stream.router.stream_broke, stream, "the connection was reset")
        for receiving in self.receiving.values():
            receiving.abandon()
        for sending in self.sending.values():
            sending.abandon()
        self.streams.clear()
        self.world.network.lose_node(self.name)

    def freeze(self) -> None:
        """The process stands still, as behind SIGSTOP: what comes waits."""
        if self._frozen is None:
            self.loop.catch_up()
            self._frozen = []

    def thaw(self) -> None:
        frozen, self._frozen = self._frozen or [], None
        for call, args in frozen:
            self.world.timeline.soon(call, *args)

    def defer(self, call: Callable[..., None], *args: Any) -> bool:
        """True: the process is dead, or stands still and `call` waits until it goes on."""
        if self._frozen is not None:
            self._frozen.append((call, args))
            return True
        return self.is_dead

    # ---- what the core says ----

    def _execute(self, command: worker_events.Command) -> None:
        match command:
            case worker_events.WriteFrame(session, frame):
                self._write(session, frame)
            case worker_events.Post(engine_command):
                self.loop.post(engine_command)
            case worker_events.Feed(transfer, event):
                sending = self.sending.get(transfer)
                if sending is not None:
                    self.world.timeline.soon(sending.feed, event)
            case worker_events.Receive():
                receiving = self.receiving[command.sequence_id] = Receiving(self, command)
                self.world.timeline.soon(receiving.start)
            case worker_events.StopReceiving(sequence_id):
                if sequence_id in self.receiving:
                    self.world.timeline.soon(self.receiving[sequence_id].stop)
            case worker_events.AcceptHandoff() | worker_events.RefuseHandoff():
                self._answer = command
            case worker_events.FailHandoffs(reason):
                broken = source_end.HandoffBroken(reason, is_ours=True)
                for sending in self.sending.values():
                    self.world.timeline.soon(sending.feed, broken)
            case worker_events.EndStream(session):
                self._close(session, "closed")
            case worker_events.CutStream(session, reason):
                self._close(session, reason)
            case worker_events.TellRole(role, generation):
                self.world.role_changed(self, role, generation)
            case worker_events.TellDrain(is_draining):
                self.world.drain_changed(self, is_draining)
            case _:
                assert_never(command)

    def _rest(self) -> None:
        """The core is asked again when it wants to be."""
        due_s = self.core.next_due_s
        timer = self._timer
        if timer is not None and timer.call is not None and timer.at_s <= due_s:
            return  # it looks again by itself
        if timer is not None:
            timer.cancel()
        self._timer = self.world.timeline.at(due_s, self._tick)

    def _tick(self) -> None:
        if self.defer(self._tick):
            return
        self._timer = None
        if self.core.next_due_s <= self.world.timeline.now:
            self.handle(worker_events.Tick())
        else:
            self._rest()

    def _on_report(self, report: Report) -> None:
        if not self.defer(self._on_report, report):
            self.handle(worker_events.StepReported(report))

    def _on_layers(self, layers: LayersFilled) -> None:
        if not self.defer(self._on_layers, layers):
            self.handle(worker_events.LayersReported(layers))

    def _describe(self, load: Load, counters: tuple[tuple[str, float], ...]) -> WorkerStatus:
        me = self.identity
        return WorkerStatus(
            worker_id=me.worker_id,
            generation=me.generation,
            role=me.role,
            model=self.model,
            load=load,
            pid=self._pid,
            host=self.name,
            kv_block_bytes=self.layout.block_bytes,
            counters=counters + self._own_counters(),
            is_draining=me.is_draining,
            max_num_seqs=self.config.max_num_seqs,
            max_batch_tokens=self.config.max_batch_tokens,
            is_rebuilding=me.is_rebuilding,
        )

    def _own_counters(self) -> tuple[tuple[str, float], ...]:
        """None ever falls, so the same sum means that none has changed."""
        counters = self.core.counters
        total = sum(counters.values())
        if total != self._counted:
            self._counted = total
            self._counters = tuple((name, float(value)) for name, value in sorted(counters.items()))
        return self._counters

    @property
    def is_idle(self) -> bool:
        return self.core.is_idle and not self.receiving and not self.sending

    # ---- routers ----

    def attach(self, stream: Stream) -> None:
        """A router's stream has come in."""
        if self.defer(self.attach, stream):
            if self.is_dead:
                latency_s = self.latency_s
                self.world.timeline.after(latency_s, stream.router.stream_broke, stream, "the connection was refused")
            return
        stream.session = next(self._sessions)
        self.streams[stream.session] = stream
        self.handle(worker_events.RouterAttached(stream.session, stream.router.name))
        self.handle(worker_events.FrameWanted(stream.session))

    def hear(self, stream: Stream, message: Any) -> None:
        """A router says something."""
        if not self.defer(self.hear, stream, message) and stream.session in self.streams:
            self.handle(worker_events.RouterSaid(stream.session, message))

    def stream_broke(self, stream: Stream) -> None:
        """A router's stream is gone."""
        if not self.defer(self.stream_broke, stream) and self.streams.pop(stream.session, None) is not None:
            stream.up.is_closed = stream.down.is_closed = True
            self.handle(worker_events.RouterLost(stream.session))

    def hang_up(self, stream: Stream) -> None:
        """A router says no more, and does not read any more either."""
        if not self.defer(self.hang_up, stream) and stream.session in self.streams:
            stream.up.is_closed = True
            self.handle(worker_events.RouterLeft(stream.session))
            self.stream_broke(stream)

    def _write(self, session: int, frame: WorkerFrame) -> None:
        stream = self.streams.get(session)
        if stream is not None:
            stream.up.send(self.world.profile.router_s, stream.router.frame, stream, frame)
            self._events.append(worker_events.FrameWanted(session))

    def _close(self, session: int, reason: str) -> None:
        stream = self.streams.pop(session, None)
        if stream is not None:
            stream.down.is_closed = True
            stream.up.send(self.latency_s, stream.router.stream_broke, stream, reason)
            self._events.append(worker_events.RouterLost(session))

    # ---- handoffs ----

    def asked(self, receiving: Receiving, opening: OpenHandoff) -> None:
        """Another worker asks for a handoff."""
        if self.defer(self.asked, receiving, opening):
            return
        transfer = next(self._transfers)
        self.handle(worker_events.HandoffAsked(transfer, opening, opening.target.generation))
        answer, self._answer = self._answer, None
        if isinstance(answer, worker_events.AcceptHandoff):
            sending = Sending(self, transfer, receiving, opening, answer.is_paced)
            self.sending[transfer] = sending
            receiving.answered(sending)
            sending.start()
        elif isinstance(answer, worker_events.RefuseHandoff):
            self.core.counters["handoffs_refused"] += 1
            refuse(self, receiving, answer)

    def received(self, sequence_id: int, receiving: Receiving, outcome: Handoff | HandoffFailed | None) -> None:
        """A Receive is over."""
        if self.receiving.get(sequence_id) is receiving:
            del self.receiving[sequence_id]
            self.handle(worker_events.HandoffEnded(sequence_id, outcome))

    def sent(self, transfer: int, reason: str) -> None:
        """A handoff that was served is over."""
        del self.sending[transfer]
        self.core.counters["handoffs_sent" if not reason else "handoffs_not_taken"] += 1
        self.handle(worker_events.HandoffReleased(transfer, reason))
