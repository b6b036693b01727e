"""Whatever workers do and in whatever order: a client gets a gapless, repeat-free prefix of the golden tokens, and one end."""

from __future__ import annotations

from dataclasses import dataclass, field

from fake_worker import MODEL, golden_text, golden_token, golden_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import RouterConfig
from router.core import RouterCore
from router.driver import make_policy
from router.events import (
    Attach,
    Deliver,
    Detach,
    Event,
    FrameArrived,
    Reject,
    RequestArrived,
    RequestCancelled,
    SendMessage,
    Tick,
    WorkerDetached,
    WorkersChanged,
)
from workers.errors import Refusal
from workers.request import FinishReason, Output, Request, SamplingParams
from workers.status import Load, Role, WorkerAddress, WorkerStatus
from workers.wire.attach import Adopt, Cancel, Migration, Submit, WorkerFrame

NUM_WORKERS = 3
REFUSALS = (Refusal.QUEUE_FULL, Refusal.WRONG_ROLE, Refusal.STALE_GENERATION, Refusal.SHUTTING_DOWN, Refusal.INTERNAL)


@dataclass
class SimWorker:
    """A worker that draws golden tokens; `connection` None: no stream."""

    name: str
    role: Role = Role.MIXED
    starts: int = 1
    switches: int = 0
    connection: int | None = None
    is_draining: bool = False
    max_num_seqs: int = 0
    """Beyond that requests wait there; 0: it has room for all."""
    running: dict[str, tuple[Request, int]] = field(default_factory=dict)
    arriving: dict[str, tuple[Request, Migration]] = field(default_factory=dict)
    """Sequences that run elsewhere and shall run here."""
    kept: dict[str, tuple[Request, int]] = field(default_factory=dict)
    """By their own names the requests that went on behind a broken stream, and how far."""
    refused: list[Output] = field(default_factory=list)
    """To be said with the next step."""
    last: FrameArrived | None = None
    """The last frame sent, to be repeated."""

    @property
    def generation(self) -> int:
        return (self.starts << 32) + self.switches

    def frame(self, outputs: tuple[Output, ...], with_status: bool) -> FrameArrived:
        assert self.connection is not None
        num_running = len(self.running) if self.max_num_seqs == 0 else min(len(self.running), self.max_num_seqs)
        load = Load(
            num_waiting=len(self.running) - num_running,
            num_running=num_running,
            num_free_blocks=100 if self.max_num_seqs == 0 else 4 * (self.max_num_seqs - num_running),
            num_blocks=100,
        )
        status = WorkerStatus(
            self.name,
            self.generation,
            self.role,
            MODEL,
            load,
            pid=self.starts,
            is_draining=self.is_draining,
            max_num_seqs=self.max_num_seqs,
        )
        frame = WorkerFrame(self.generation, outputs, load, status=status if with_status else None)
        self.last = FrameArrived(self.name, self.connection, frame)
        return self.last

    def step(self, num_tokens: int) -> tuple[Output, ...]:
        outputs, self.refused = self.refused, []
        for wire_id, (request, position) in list(self.running.items()):
            end = min(position + num_tokens, request.params.max_tokens)
            tokens = tuple(golden_token(request, index) for index in range(position, end))
            is_last = end == request.params.max_tokens
            text = "".join(map(golden_text, tokens))
            reason = FinishReason.LENGTH if is_last else None
            outputs.append(Output(wire_id, position, tokens, text, finish_reason=reason))
            if is_last:
                del self.running[wire_id]
            else:
                self.running[wire_id] = (request, end)
        return tuple(outputs)


class World:
    """Sim workers around a real core; checks every delivery as it is made."""

    def __init__(self, max_num_seqs: int = 0) -> None:
        config = RouterConfig(
            model="unused",
            max_running=4,
            max_queue=6,
            max_attempts=4,
            recovery_timeout_s=20.0,
            request_timeout_s=100.0,
            max_migrations=2,
            rebalance_gap=2,
            rebalance_cooldown_s=0.5,
            worker_backlog=1 if max_num_seqs else 4,
            prefill_backlog_tokens=4 if max_num_seqs else 32_768,
        )
        self.core = RouterCore(config, make_policy(config))
        self.now = 0.0
        names = [f"w-{index}" for index in range(NUM_WORKERS)]
        self.workers = {name: SimWorker(name, max_num_seqs=max_num_seqs) for name in names}
        self.requests: dict[str, Request] = {}
        self.delivered: dict[str, list[int]] = {}
        self.texts: dict[str, str] = {}
        self.ended: dict[str, str] = {}
        self.tell(WorkersChanged(tuple(WorkerAddress(name, 1 << 32, name) for name in self.workers)))

    def tell(self, event: Event) -> None:
        self.now += 0.01
        for command in self.core.handle(event, self.now):
            match command:
                case Attach(name, connection):
                    self.workers[name].connection = connection
                    self.clear(name)
                case Detach(name, connection):
                    if self.workers[name].connection == connection:
                        self.workers[name].connection = None
                        self.clear(name)
                case SendMessage(name, connection, message):
                    worker = self.workers[name]
                    if worker.connection == connection and isinstance(message, Submit):
                        request = message.request
                        assert request.request_id not in worker.running
                        original = self.requests[request.request_id.split("#")[0]]
                        assert list(request.replay_token_ids) == self.delivered[original.request_id]
                        if message.migration is not None:
                            worker.arriving[request.request_id] = (request, message.migration)
                        else:
                            worker.running[request.request_id] = (request, len(request.replay_token_ids))
                    elif worker.connection == connection and isinstance(message, Adopt):
                        request, end = worker.kept.pop(message.name, (None, -1))
                        if request is not None and message.position <= end:
                            worker.running[message.request_id] = (request, message.position)
                        else:
                            error = Output(message.request_id, 0, (), finish_reason=FinishReason.ERROR)
                            worker.refused.append(error._replace(refusal=Refusal.NOT_KEPT))
                    elif worker.connection == connection and isinstance(message, Cancel):
                        worker.running.pop(message.request_id, None)
                        worker.arriving.pop(message.request_id, None)
                case Deliver(output):
                    self.check(output)
                case Reject(name):
                    self.end(name, "rejected")

    def clear(self, name: str) -> None:
        self.workers[name].running.clear()
        self.workers[name].arriving.clear()
        self.workers[name].refused.clear()

    def land(self, worker: SimWorker, is_told: bool) -> None:
        """A sequence arrives as it stands at its source, or is refused; `is_told`: the source hears that it has landed."""
        wire_id, (request, migration) = worker.arriving.popitem()
        source = self.workers[migration.source.worker_id]
        state = source.running.get(migration.request_id)
        if state is None:
            output = Output(wire_id, 0, finish_reason=FinishReason.ERROR, refusal=Refusal.NOT_MOVABLE)
            self.tell(worker.frame((output,), with_status=False))
            return
        worker.running[wire_id] = (request, state[1])
        if is_told:
            del source.running[migration.request_id]
            marker = Output(migration.request_id, state[1], finish_reason=FinishReason.MOVED)
            self.tell(source.frame((marker,), with_status=False))

    def check(self, output: Output) -> None:
        name = output.request_id
        assert name not in self.ended
        assert output.position == len(self.delivered[name])
        self.delivered[name] += output.token_ids
        golden = golden_tokens(self.requests[name])
        assert self.delivered[name] == golden[: len(self.delivered[name])]
        self.texts[name] += output.text
        assert self.texts[name] == "".join(map(golden_text, self.delivered[name]))
        if output.finish_reason is not None:
            if output.finish_reason is not FinishReason.ERROR:
                assert self.delivered[name] == golden
            self.end(name, output.finish_reason)

    def end(self, name: str, how: str) -> None:
        assert name not in self.ended
        self.ended[name] = how

    def act(self, action: str, number: int) -> None:
        worker = self.workers[f"w-{number % NUM_WORKERS}"]
        match action:
            case "arrive":
                name = f"r{len(self.requests)}"
                params = SamplingParams(max_tokens=1 + number % 7, seed=number)
                self.requests[name] = Request(name, tuple(range(1, 2 + number % 9)), params, priority=number % 2)
                self.delivered[name], self.texts[name] = [], ""
                self.tell(RequestArrived(self.requests[name]))
            case "cancel" if self.requests:
                name = f"r{number % len(self.requests)}"
                if name not in self.ended:
                    self.end(name, "cancelled")
                self.tell(RequestCancelled(name))
            case "tick":
                self.now += (0.0, 0.1, 1.0, 3.0, 6.0)[number % 5]
                self.tell(Tick())
            case "restart":
                worker.starts, worker.connection = worker.starts + 1, None
                worker.kept.clear()
                self.clear(worker.name)
                addresses = [WorkerAddress(name, other.generation, name) for name, other in self.workers.items()]
                self.tell(WorkersChanged(tuple(addresses)))
            case "repeat" if worker.last is not None:
                self.tell(worker.last)
            case _ if worker.connection is None:
                pass
            case "step":
                self.tell(worker.frame(worker.step(1 + number % 3), with_status=number % 2 == 0))
            case "lose_frame":
                worker.step(1)
            case "report":
                self.tell(worker.frame((), with_status=True))
            case "refuse" if worker.running:
                wire_id = next(iter(worker.running))
                del worker.running[wire_id]
                refusal = REFUSALS[number % len(REFUSALS)]
                output = Output(wire_id, 0, finish_reason=FinishReason.ERROR, refusal=refusal)
                self.tell(worker.frame((output,), with_status=False))
            case "break":
                connection, worker.connection = worker.connection, None
                for wire_id, (request, position) in worker.running.items():
                    further = min(position + number % 3, request.params.max_tokens)
                    worker.kept[wire_id.split("#")[0]] = request, further
                self.clear(worker.name)
                self.tell(WorkerDetached(worker.name, connection, "broken"))
            case "land" if worker.arriving:
                self.land(worker, is_told=number % 4 != 0)
            case "drain":
                worker.is_draining = not worker.is_draining
                self.tell(worker.frame((), with_status=True))
                self.now += 0.6
                self.tell(Tick())
            case "switch":
                worker.role = list(Role)[number % 3]
                worker.switches += 1
                self.tell(worker.frame((), with_status=True))

    def settle(self) -> None:
        """Everything heals; whatever is open must end, a request whose last frame got lost by its deadline."""
        for worker in self.workers.values():
            worker.role = Role.MIXED
            worker.is_draining = False
        for _ in range(120):
            self.act("tick", 2)
            for worker in self.workers.values():
                while worker.arriving and worker.connection is not None:
                    self.land(worker, is_told=True)
                if worker.connection is not None:
                    self.tell(worker.frame(worker.step(1), with_status=True))


ACTIONS = (
    "arrive",
    "arrive",
    "step",
    "step",
    "step",
    "report",
    "tick",
    "cancel",
    "break",
    "restart",
    "repeat",
    "drain",
    "land",
)
FAULTS = ("refuse", "switch", "lose_frame")
stories = st.lists(st.tuples(st.sampled_from(ACTIONS + FAULTS), st.integers(0, 104)), max_size=80)


@settings(max_examples=250, deadline=None)
@given(stories, st.sampled_from([0, 1, 2]))
def test_no_fault_changes_loses_or_repeats_a_token(story: list[tuple[str, int]], max_num_seqs: int) -> None:
    """Also where workers have room for one or two requests, so that most wait: none waits for ever."""
    world = World(max_num_seqs)
    for number in range(NUM_WORKERS):
        world.act("report", number)
    for action, number in story:
        world.act(action, number)
    world.settle()
    assert set(world.ended) == set(world.requests)
    assert len(world.core.flights.migrations) == 0
    assert len(world.core.flights) == world.core.flights.num_running == world.core.flights.num_waiting == 0
    assert all(len(entry.charges) == 0 and entry.charges.num_blocks == 0 for entry in world.core.fleet)
