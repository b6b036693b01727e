"""A worker core and the world around it in one test: routers, an engine that says what it is told to say, and a clock."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from builders import fake_layout, make_request

from workers.config import WorkerConfig
from workers.engine.messages import EngineCommand, Report, StepResult
from workers.handoff.protocol.messages import OpenHandoff, RunningSubject, Subject
from workers.request import FinishReason, Output, Request
from workers.serving import events
from workers.serving.core import WorkerCore
from workers.status import Identity, KvEvent, Load, ModelInfo, Role, WorkerAddress, WorkerStatus
from workers.trust.permits import make_permit
from workers.wire.attach import Adopt, Cancel, DumpRequest, Submit, WorkerFrame

GENERATION = 1 << 32
MODEL = ModelInfo("fake", "fake-1", 1000, 4096, 64)
PEER = WorkerAddress("prefill-0", GENERATION, "127.0.0.1:1")
LAYOUT = fake_layout()
ASKER = "decode-9"
"""The other worker that asks for something."""


def permitted(name: str) -> RunningSubject:
    """What runs under a name, with the permit that the asker gets of a router without a secret."""
    return RunningSubject(name, make_permit(b"", ASKER))


class WorkerStory:
    """Routers take each frame at once, but those in `stuck`, whose last frame is never written."""

    def __init__(self, role: Role = Role.MIXED, **settings: object) -> None:
        self.config = WorkerConfig(model="fake", **{"max_num_seqs": 16, "max_batch_tokens": 96, **settings})  # type: ignore[arg-type]
        self.identity = Identity("w-0", role, GENERATION, "127.0.0.1:9")
        self.core = WorkerCore(self.config, self.identity, LAYOUT, MODEL.fingerprint, self._describe)
        self.now = 100.0
        self.posted: list[EngineCommand] = []
        self.frames: dict[int, list[WorkerFrame]] = {}
        self.attached: set[int] = set()
        self.stuck: set[int] = set()
        self.ended: set[int] = set()
        self.cut: set[int] = set()
        self.others: list[events.Command] = []
        """All commands that go neither to the engine nor to routers."""

    def _describe(self, load: Load, counters: tuple[tuple[str, float], ...]) -> WorkerStatus:
        me = self.identity
        flags = {"is_draining": me.is_draining, "is_rebuilding": me.is_rebuilding}
        return WorkerStatus(me.worker_id, me.generation, me.role, MODEL, load, counters=counters, **flags)  # type: ignore[arg-type]

    def tell(self, event: events.Event) -> list[events.Command]:
        """All commands that the event brings, also by way of routers that take another frame."""
        match event:
            case events.RouterAttached(session):
                self.attached.add(session)
            case events.RouterLost(session):
                self.attached.discard(session)
        told = list(self.core.handle(event, self.now))
        for command in told:  # of a session that has ended nothing is asked
            assert getattr(command, "session", None) in {None, *self.attached}
        for command in list(told):
            match command:
                case events.Post(engine_command):
                    self.posted.append(engine_command)
                case events.WriteFrame(session, frame):
                    self.frames.setdefault(session, []).append(frame)
                    if session not in self.stuck:
                        told += self.tell(events.FrameWanted(session))
                case events.EndStream(session):
                    self.ended.add(session)
                    self.lose(session)
                case events.CutStream(session):
                    self.cut.add(session)
                    self.lose(session)
                case _:
                    self.others.append(command)
        return told

    # ---- time ----

    def after(self, seconds: float) -> None:
        """Time passes, and the core is woken whenever it said it must be."""
        until = self.now + seconds
        while self.core.next_due_s <= until:
            self.now = max(self.now, self.core.next_due_s)
            self.tell(events.Tick())
        self.now = until

    # ---- routers ----

    def attach(self, session: int, router_id: str = "", dump: Iterable[int] | None = ()) -> None:
        """A router has attached, and has the cache as it is, unless `dump` is None."""
        self.tell(events.RouterAttached(session, router_id or f"router-{session}"))
        self.tell(events.FrameWanted(session))
        if dump is not None:
            self.step(dump=dump, askers=[session])

    def lose(self, session: int) -> None:
        self.stuck.discard(session)
        self.tell(events.RouterLost(session))

    def submit(self, session: int, request: Request | str, *prefill: WorkerAddress, **fields: object) -> int:
        """Returns the engine's number of the request; 0 when it was refused."""
        if isinstance(request, str):
            request = make_request(range(5, 105), 50, request_id=request)
        generation = fields.pop("generation", self.identity.generation)
        before = len(self.posted)
        self.tell(events.RouterSaid(session, Submit(request, generation, prefill, **fields)))  # type: ignore[arg-type]
        return getattr(self.posted[-1], "sequence_id", 0) if len(self.posted) > before else 0

    def cancel(self, session: int, name: str) -> None:
        self.tell(events.RouterSaid(session, Cancel(name)))

    def adopt(self, session: int, name: str, attempt: str, position: int) -> None:
        self.tell(events.RouterSaid(session, Adopt(name, attempt, position)))

    def ask_for_dump(self, session: int) -> None:
        self.tell(events.RouterSaid(session, DumpRequest()))

    def heard(self, session: int) -> list[Output]:
        return [output for frame in self.frames.get(session, []) for output in frame.outputs]

    def tokens(self, session: int, name: str) -> list[int]:
        """Checked for gaps and repeats, from the first position heard on."""
        outputs = [o for o in self.heard(session) if o.request_id == name]
        for before, output in pairwise(outputs):
            assert output.position == before.position + len(before.token_ids) or output.refusal is not None
        return [token for output in outputs for token in output.token_ids]

    def load(self, session: int) -> Load | None:
        """What the router believes."""
        loads = [frame.load for frame in self.frames[session] if frame.load is not None]
        return loads[-1] if loads else None

    def last(self, session: int) -> Output:
        return self.heard(session)[-1]

    # ---- the engine ----

    def step(
        self, *outputs: tuple[int, Output], load: Load | None = None, dump: Iterable[int] | None = None,
        askers: Iterable[int] = (), stored: Iterable[int] = (), num_held: int = 0, **result: object,
    ) -> list[events.Command]:  # fmt: skip
        """One step's report."""
        said = StepResult(outputs=list(outputs), dump_askers=list(askers), **result)  # type: ignore[arg-type]
        if dump is not None:
            said.kv_dump = KvEvent(1, tuple(dump), reset=True)
        if tuple(stored):
            said.kv_event = KvEvent(1, tuple(stored))
        return self.tell(
            events.StepReported(Report(said, load or Load(num_running=len(outputs)), num_held_blocks=num_held))
        )

    def say(self, sequence_id: int, name: str, position: int, *tokens: int, ends: FinishReason | None = None) -> None:
        """One step with an output."""
        text = "".join(f"<{token}>" for token in tokens)
        self.step((sequence_id, Output(name, position, tokens, text, finish_reason=ends)))

    # ---- peers ----

    def ask(self, transfer: int, subject: Subject, num_blocks: int, **fields: object) -> list[events.Command]:
        """Another worker asks for something."""
        opening = OpenHandoff(
            target=WorkerAddress(ASKER, 7, "127.0.0.1:3"),
            host="there",
            source_generation=int(fields.get("source_generation", self.identity.generation)),  # type: ignore[call-overload]
            model_fingerprint=str(fields.get("fingerprint", MODEL.fingerprint)),
            layout=LAYOUT,
            subject=subject,
            first_block=0,
            num_blocks=num_blocks,
            transports=("shm",),
        )
        return self.tell(events.HandoffAsked(transfer, opening, 7))

    def fed(self, transfer: int) -> list[object]:
        return [c.event for c in self.others if isinstance(c, events.Feed) and c.transfer == transfer]

    def taken(self, kind: type) -> list[EngineCommand]:
        """What the engine was told of one kind."""
        return [command for command in self.posted if isinstance(command, kind)]
