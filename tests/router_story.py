"""A router core, the time and what it has asked for so far: tells it what workers and clients do. No network and no clock."""

from __future__ import annotations

from router.config import RouterConfig
from router.core import RouterCore
from router.driver import make_policy
from router.events import (
    Attach,
    Command,
    Deliver,
    Event,
    FrameArrived,
    SendMessage,
    Tick,
    WorkerDetached,
    WorkersChanged,
)
from workers.errors import Refusal
from workers.request import FinishReason, Output, Request, SamplingParams
from workers.status import Load, ModelInfo, Role, WorkerAddress, WorkerStatus, first_generation, starts_of
from workers.wire.attach import Submit, WorkerFrame

MODEL = ModelInfo("fake", "fingerprint", vocab_size=1000, max_model_len=4096, block_size=4)


GENERATION = first_generation(1)


FREE = Load(num_free_blocks=1000, num_blocks=1000)


def request(name: str = "r", prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8, priority: int = 0) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=1), priority=priority)


class Story:
    """A core, the time, and what the core has asked for so far."""

    def __init__(self, *workers: tuple[str, Role], **settings: object) -> None:
        self.core = RouterCore(config := RouterConfig(model="unused", **settings), make_policy(config))  # type: ignore[arg-type]
        self.now = 100.0
        self.connections: dict[str, int] = {}
        self.commands: list[Command] = []
        self.members = tuple(WorkerAddress(name, GENERATION, f"host:{name}") for name, _ in workers)
        if workers:
            self.tell(WorkersChanged(self.members))
        for name, role in workers:
            self.report(name, role)
        self.commands.clear()

    def tell(self, event: Event) -> list[Command]:
        commands = self.core.handle(event, self.now)
        for command in commands:
            if isinstance(command, Attach):
                self.connections[command.worker_id] = command.connection
        self.commands += commands
        return commands

    def frame(self, worker: str, frame: WorkerFrame) -> list[Command]:
        return self.tell(FrameArrived(worker, self.connections[worker], frame))

    def report(
        self, worker: str, role: Role, generation: int = GENERATION, load: Load = FREE, model: ModelInfo = MODEL
    ) -> list[Command]:
        status = WorkerStatus(worker, generation, role, model, load, pid=starts_of(generation))
        return self.frame(worker, WorkerFrame(generation, status=status))

    def output(self, worker: str, name: str, position: int, *tokens: int, finish: bool = False) -> list[Command]:
        reason = FinishReason.LENGTH if finish else None
        text = "".join(f"<{token}>" for token in tokens)
        return self.frame(
            worker, WorkerFrame(GENERATION, (Output(name, position, tokens, text, finish_reason=reason),))
        )

    def refuse(self, worker: str, name: str, refusal: Refusal) -> list[Command]:
        output = Output(name, 0, finish_reason=FinishReason.ERROR, refusal=refusal, message="no")
        return self.frame(worker, WorkerFrame(GENERATION, (output,)))

    def lose(self, worker: str) -> list[Command]:
        return self.tell(WorkerDetached(worker, self.connections[worker], "broken pipe"))

    def after(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.tell(Tick())

    def ticks(self, seconds: float) -> list[Command]:
        """Time passes as in a router that runs: with a tick every 0.1 s."""
        return [command for _ in range(round(seconds * 10)) for command in self.after(0.1)]

    def count(self, name: str) -> int:
        return self.core.counters[name]


def submits(commands: list[Command]) -> list[tuple[str, Submit]]:
    return [(c.worker_id, c.message) for c in commands if isinstance(c, SendMessage) and isinstance(c.message, Submit)]


def the_submit(commands: list[Command]) -> tuple[str, Submit]:
    (only,) = submits(commands)
    return only


def outputs(commands: list[Command]) -> list[Output]:
    return [command.output for command in commands if isinstance(command, Deliver)]


def messages(commands: list[Command], kind: type) -> list[object]:
    return [
        command.message
        for command in commands
        if isinstance(command, SendMessage) and isinstance(command.message, kind)
    ]


PD = (("d-0", Role.DECODE), ("d-1", Role.DECODE), ("p-0", Role.PREFILL), ("p-1", Role.PREFILL))


MIXED = (("m-0", Role.MIXED), ("m-1", Role.MIXED))
