"""One simulated router process: the product's router core with a loop around it in virtual time. Decides nothing."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Protocol, assert_never

from cluster.sim.core_loop import CoreLoop
from cluster.sim.network import Network
from cluster.sim.product import (
    NO_WISHES,
    Adopt,
    Membership,
    MembershipTick,
    Output,
    Request,
    RouterConfig,
    RouterCore,
    Snapshot,
    Submit,
    Wishes,
    WorkerFrame,
    make_policy,
    router_events,
)
from cluster.sim.profiles.profile import Profile
from cluster.sim.timeline import Timeline
from cluster.sim.worker import SimWorker, Stream


class World(Protocol):
    """What a router finds around it."""

    timeline: Timeline
    network: Network
    profile: Profile

    def worker_at(self, target: str) -> SimWorker | None: ...

    def delivered(self, router: SimRouter, output: Output) -> None: ...

    def rejected(self, router: SimRouter, rejection: router_events.Reject) -> None: ...

    def submitted(self, request_name: str) -> None: ...

    def note(self, text: str) -> None: ...


class SimRouter(CoreLoop[router_events.Event, router_events.Command]):
    """A process from its start to its end. `grace_s` and `doubt_s` are its membership's."""

    core: RouterCore

    def __init__(self, world: World, config: RouterConfig, name: str, grace_s: float, doubt_s: float) -> None:
        super().__init__(world.timeline)
        self.world = world
        self.name = name
        self.core = RouterCore(config, make_policy(config), sha256(name.encode()).digest())
        self.membership = Membership(grace_s, doubt_s)
        self._config = config
        self._streams: dict[int, Stream] = {}
        self._known: set[str] = set()
        """Workers that it has connected to before."""

    def start(self) -> None:
        self._tick()

    def kill(self) -> None:
        """The process is gone at once; workers find out, and so do its clients."""
        self.is_dead = True
        for stream in self._streams.values():
            stream.up.is_closed = stream.down.is_closed = True
            self.world.timeline.after(self.world.profile.control_latency_s, stream.worker.stream_broke, stream)
        self._streams.clear()

    def _tick(self) -> None:
        if self.is_dead:
            return
        self._hear_steps()
        self.handle(router_events.Tick())
        self.world.timeline.after(self._config.tick_s, self._tick)

    def _hear_steps(self) -> None:
        """Workers that take many steps at once would have told of each: what is learnt from is the last one that is here by now."""
        fleet, by_s = self.core.fleet, self.world.timeline.now - self.world.profile.router_s
        for stream in self._streams.values():
            step = stream.worker.loop.step_before(by_s)
            if step is not None and step.number != stream.heard:
                stream.heard = step.number
                entry = fleet.on_connection(stream.worker.name, stream.connection)
                if entry is not None and entry.is_up:
                    fleet.table.note_step(entry.row, step.num_decodes, step.context, 0, 0, step.seconds)

    # ---- what the core says ----

    def _execute(self, command: router_events.Command) -> None:
        match command:
            case router_events.Deliver(output):
                self.world.delivered(self, output)
            case router_events.SendMessage(worker_id, connection, message):
                self._send(worker_id, connection, message)
            case router_events.Attach():
                self._attach(command)
            case router_events.Detach(_, connection):
                stream = self._streams.pop(connection, None)
                if stream is not None:
                    self.world.note(f"{self.name} gives the stream of {stream.worker.name} up")
                    stream.up.is_closed = True
                    stream.down.send(self.world.profile.router_s, stream.worker.hang_up, stream)
            case router_events.Reject():
                self.world.rejected(self, command)
            case router_events.Explain() | router_events.TellFound() | router_events.JobEnded():
                pass  # no simulated client asks
            case _:
                assert_never(command)

    def _send(self, worker_id: str, connection: int, message: Any) -> None:
        stream = self._streams.get(connection)
        if stream is None:
            self._events.append(router_events.WorkerDetached(worker_id, connection, "the stream is gone"))
            return
        if isinstance(message, Submit):
            self._note_submission(worker_id, message)
        elif isinstance(message, Adopt):
            self.world.note(
                f"{self.name} asks {worker_id} to go on with {message.name} from token {message.position} on"
            )
        stream.down.send(self.world.profile.router_s, stream.worker.hear, stream, message)

    def _note_submission(self, worker_id: str, submit: Submit) -> None:
        if submit.migration is not None:
            moves = f"{submit.migration.source.worker_id} to {worker_id}"
            self.world.note(f"{self.name} moves {submit.name} from {moves}")
            return
        self.world.submitted(submit.name)
        if submit.request.request_id != f"{submit.name}#1":
            num_known = len(submit.request.replay_token_ids)
            self.world.note(f"{self.name} sends {submit.name} to {worker_id} again, with {num_known} tokens to replay")

    def _attach(self, command: router_events.Attach) -> None:
        worker = self.world.worker_at(command.target)
        latency_s = self.world.profile.router_s
        if worker is None:
            detached = router_events.WorkerDetached(command.worker_id, command.connection, "nobody is there")
            self.world.timeline.after(latency_s, self.handle, detached)
            return
        if worker.name in self._known:
            self.world.note(f"{self.name} connects to {worker.name} again")
        self._known.add(worker.name)
        stream = self._streams[command.connection] = Stream(self, worker, command.connection, self.world.network)
        stream.down.send(latency_s, worker.attach, stream)

    def frame(self, stream: Stream, frame: WorkerFrame) -> None:
        """A worker's frame has arrived."""
        self.handle(router_events.FrameArrived(stream.worker.name, stream.connection, frame))

    def stream_broke(self, stream: Stream, reason: str) -> None:
        """A worker's stream is gone."""
        stream.up.is_closed = stream.down.is_closed = True
        if self._streams.pop(stream.connection, None) is not None:
            self.world.note(f"{self.name} loses the stream of {stream.worker.name}: {reason}")
            self.handle(router_events.WorkerDetached(stream.worker.name, stream.connection, reason))

    # ---- clients and the store ----

    def submit(self, request: Request, wishes: Wishes = NO_WISHES) -> None:
        self._hear_steps()
        self.handle(router_events.RequestArrived(request, wishes))

    def cancel(self, request_id: str) -> None:
        self.handle(router_events.RequestCancelled(request_id))

    def members(self, snapshot: Snapshot) -> None:
        """The store says who has registered."""
        self._tell_members(snapshot)

    def _tell_members(self, event: Snapshot | MembershipTick) -> None:
        if self.is_dead:
            return
        changed = self.membership.handle(event, self.world.timeline.now)
        if self.membership.deadline is not None:
            self.world.timeline.at(self.membership.deadline, self._tell_members, MembershipTick())
        if changed is not None:
            self.handle(router_events.WorkersChanged(changed))
