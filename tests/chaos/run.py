"""Runs requests with one planned fault each through an arena and compares every answer with the golden run."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import grpc
from builders import make_request
from stream_reader import Reader

from chaos.arena import Arena, Shape
from chaos.faults import Fault
from chaos.injector import Injector
from router.api.formats.formats import TOOL_CALL
from router.api.formats.grammars import CallableTool, call_rule, calls_rule, json_rule, whole
from workers.request import FinishReason, Output, Request

REQUEST_TIMEOUT_S = 150.0


class Recovery(StrEnum):
    """How a request came to its end, the farthest-reaching first."""

    LEFT = "left"
    RESUMED = "resumed"
    """Its router was killed, and its client went on at another."""
    REPLAYED = "replayed"
    MOVED = "moved"
    """A running request went on at another decode worker, or was asked to."""
    LOCAL = "local prefill"
    OTHER_WORKER = "other worker"
    DEGRADED = "degraded"
    RESENT = "re-sent"
    UNHARMED = "unharmed"


@dataclass(slots=True)
class Outcome:
    """One request's end. `trouble` is empty when every token is that of the golden run."""

    request_id: str
    planned: Fault | None
    injected: bool
    recovery: Recovery
    trouble: str
    seconds: float


@dataclass(slots=True)
class Result:
    """One arena's run."""

    transport: str
    outcomes: list[Outcome] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    num_killed: int = 0
    num_stopped: int = 0
    num_switched: int = 0
    num_drained: int = 0
    num_moved: int = 0
    """Running requests that another decode worker took over."""

    @property
    def is_good(self) -> bool:
        return not self.leaks and not any(outcome.trouble for outcome in self.outcomes)


_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99999},
        "kind": {"enum": ["order", "return"]},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 9},
    },
    "required": ["id", "kind", "names"],
    "additionalProperties": False,
}
_TOOLS = (CallableTool("find", _SCHEMA, True), CallableTool("stop", None, True))
GRAMMARS = (
    "start: /([a-z]{2,9} )+/",
    whole(json_rule(_SCHEMA)),
    whole(calls_rule(call_rule(_TOOLS, TOOL_CALL, {}), is_parallel=True)),
)
"""A regular expression, JSON by a schema, and calls of tools as `tool_choice: required` enforces them."""


def draw_requests(
    seed: int, transport: str, num_requests: int, lengths: tuple[int, ...] = (2, 8, 24, 60, 120)
) -> list[Request]:
    """Prompts of 4 to 10 blocks of 64, some with a common beginning, greedy, sampled and with a grammar; answers of so many tokens."""
    vocab = range(10, 1000)
    dice = random.Random(f"requests/{seed}/{transport}")
    common = [dice.choice(vocab) for _ in range(130)]
    requests = []
    for index in range(num_requests):
        length = dice.randint(200, 640)
        start = common if dice.random() < 0.2 else []
        prompt = [*start, *(dice.choice(vocab) for _ in range(length - len(start)))]
        requests.append(
            make_request(
                prompt,
                dice.choice(lengths),
                request_id=f"{transport}-{index}",
                temperature=dice.choice((0.0, 1.0)),
                seed=dice.randrange(1 << 30),
                ignore_eos=True,
                grammar=GRAMMARS[index // 3 % 3] if index % 3 == 2 else "",
            )
        )
    return requests


@asynccontextmanager
async def warm() -> AsyncIterator[None]:
    """What gRPC makes once in a process, and unmakes with its last user, is no leak: holds it meanwhile."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        yield
    await server.stop(None)


class ChaosRun:
    """One arena, its requests and its plan; `golden(request)` gives (tokens, text)."""

    def __init__(
        self,
        shape: Shape,
        requests: list[Request],
        plan: list[Fault | None],
        golden: Callable[[Request], tuple[list[int], str]],
        concurrency: int,
    ) -> None:
        self._requests = requests
        self._plan = plan
        self._golden = golden
        self._concurrency = concurrency
        self._preferred = shape.config["transports"][0]
        faults = {r.request_id: f for r, f in zip(requests, plan, strict=True) if f is not None}
        self._injector = Injector(faults, self._leave)
        self._arena = self._injector.arena = Arena(shape, self._injector, self._injector.struck)
        self._streams: dict[str, Reader] = {}
        self._left: set[str] = set()
        self._injector.is_running = self._streams.__contains__

    async def run(self, transport: str) -> Result:
        async with warm():
            return await self._run(transport)

    async def _run(self, transport: str) -> Result:
        result = Result(transport)
        started = time.monotonic()
        try:
            await self._arena.open()
            gate = asyncio.Semaphore(self._concurrency)
            pairs = zip(self._requests, self._plan, strict=True)
            result.outcomes = await asyncio.gather(*(self._one(request, fault, gate) for request, fault in pairs))
            await self._injector.close()
        finally:
            await self._arena.close()
        arena = self._arena
        result.leaks = arena.leaks
        result.num_killed, result.num_stopped = arena.num_killed, arena.num_stopped
        result.num_switched, result.num_drained = arena.num_switched, arena.num_drained
        result.num_moved = arena.num_moved
        result.seconds = time.monotonic() - started
        return result

    def _leave(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            self._left.add(request_id)
            stream.close()

    async def _one(self, request: Request, fault: Fault | None, gate: asyncio.Semaphore) -> Outcome:
        async with gate:
            started = time.monotonic()
            outputs: list[Output] = []
            trouble = ""
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    stream = self._streams[request.request_id] = Reader(self._arena.driver.submit(request))
                    async for output in stream:
                        outputs.append(output)
            except TimeoutError:
                trouble = "hung"
                stream.close()
            except Exception as error:
                trouble = repr(error)
            finally:
                self._streams.pop(request.request_id, None)
            seconds = time.monotonic() - started
        name = request.request_id
        tokens, text = await asyncio.to_thread(self._golden, request)
        trouble = trouble or self._judge(outputs, tokens, text, name in self._left)
        return Outcome(name, fault, name in self._injector.injected, self._recovery(name, outputs), trouble, seconds)

    def _judge(self, outputs: list[Output], tokens: list[int], text: str, has_left: bool) -> str:
        """What is wrong with an answer; empty when nothing is."""
        got = [token for output in outputs for token in output.token_ids]
        said = "".join(output.text for output in outputs)
        if has_left:
            return "" if got == tokens[: len(got)] else "other tokens than the golden run's before the client left"
        if not outputs or outputs[-1].finish_reason is FinishReason.ERROR:
            last = outputs[-1] if outputs else None
            return f"failed: {last.refusal if last else None} {last.message if last else ''}"
        if got != tokens:
            at = next(
                (i for i, (a, b) in enumerate(zip(got, tokens, strict=False)) if a != b), min(len(got), len(tokens))
            )
            return f"other tokens than the golden run's from position {at} on ({len(got)} of {len(tokens)})"
        return "" if said == text else "the tokens are right, the text is not"

    def _recovery(self, name: str, outputs: list[Output]) -> Recovery:
        report = next((output.handoff for output in outputs if output.handoff is not None), None)
        chosen = self._injector.transports.get(name, [])
        if name in self._left:
            return Recovery.LEFT
        if self._injector.num_submits.get(name, 0) > 1:
            return Recovery.REPLAYED
        if self._injector.num_moves.get(name, 0):
            return Recovery.MOVED
        if report is not None and report.transport == "local":
            return Recovery.LOCAL
        if report is not None and report.attempts > 1:
            return Recovery.OTHER_WORKER
        if len(set(chosen)) > 1 or (report is not None and report.transport != self._preferred):
            return Recovery.DEGRADED
        return Recovery.RESENT if len(chosen) > 1 else Recovery.UNHARMED
