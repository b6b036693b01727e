"""A worker without a model: an Attach server whose tokens are a known function of the request, and that can die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from workers.errors import Refusal
from workers.pb import worker_pb2_grpc
from workers.request import FinishReason, HandoffReport, Output, Request
from workers.status import Load, ModelInfo, Role, WorkerAddress, WorkerStatus
from workers.wire import attach_protobuf as wire
from workers.wire.attach import Cancel, Submit, WorkerFrame
from workers.wire.streams import Sealer

MODEL = ModelInfo("fake", "fake-model", vocab_size=1000, max_model_len=4096, block_size=4)


def golden_token(request: Request, position: int) -> int:
    """The token that every worker draws at this position."""
    seed = request.params.seed or 0
    return (sum(request.prompt_token_ids) * 31 + seed * 17 + position * 7 + request.choice_index) % 1000


def golden_tokens(request: Request) -> list[int]:
    return [golden_token(request, position) for position in range(request.params.max_tokens)]


def golden_text(token: int) -> str:
    return f"<{token}>"


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Draws a token for every request a step; a step is one turn of `steps` (one permit each; None: free running)."""

    def __init__(self, worker_id: str, role: Role = Role.MIXED, starts: int = 1) -> None:
        self.worker_id = worker_id
        self.role = role
        self.generation = starts << 32
        self.is_draining = False
        self.submits: list[Submit] = []
        self.cancels: list[str] = []
        self.submitted = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.steps: asyncio.Semaphore | None = None
        self._outboxes: set[asyncio.Queue[WorkerFrame | None]] = set()
        self._server: grpc.aio.Server | None = None
        self.target = ""

    async def start(self) -> WorkerAddress:
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port(self.target or "127.0.0.1:0")
        self.target = f"127.0.0.1:{port}"
        await self._server.start()
        return WorkerAddress(self.worker_id, self.generation, self.target)

    async def die(self) -> None:
        """Every stream breaks at once."""
        assert self._server is not None
        await self._server.stop(None)

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self.worker_id,
            self.generation,
            self.role,
            MODEL,
            Load(num_free_blocks=1000, num_blocks=1000),
            is_draining=self.is_draining,
        )

    def say(self, frame: WorkerFrame) -> None:
        """Sends a frame to every router."""
        for outbox in self._outboxes:
            outbox.put_nowait(frame)

    async def Attach(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        outbox: asyncio.Queue[WorkerFrame | None] = asyncio.Queue()
        outbox.put_nowait(WorkerFrame(self.generation, status=self.status()))
        self._outboxes.add(outbox)
        running: dict[str, asyncio.Task[None]] = {}
        reader = asyncio.create_task(self._read(request_iterator, outbox, running))
        try:
            sealer = Sealer()
            while (frame := await outbox.get()) is not None:
                yield sealer.seal(wire.frame_to_pb(frame))
        finally:
            self._outboxes.discard(outbox)
            for task in (reader, *running.values()):
                task.cancel()

    async def _read(
        self,
        messages: AsyncIterator[Any],
        outbox: asyncio.Queue[WorkerFrame | None],
        running: dict[str, asyncio.Task[None]],
    ) -> None:
        async for message in messages:
            parsed = wire.router_message_from_pb(message)
            match parsed:
                case Submit(request):
                    self.submits.append(parsed)
                    self.submitted.set()
                    running[request.request_id] = asyncio.create_task(self._generate(parsed, outbox))
                case Cancel(request_id):
                    self.cancels.append(request_id)
                    self.cancelled.set()
                    if request_id in running:
                        running.pop(request_id).cancel()
                case _:
                    pass
        outbox.put_nowait(None)  # the router says no more

    async def _generate(self, submit: Submit, outbox: asyncio.Queue[WorkerFrame | None]) -> None:
        request = submit.request
        if submit.generation != self.generation or not self.role.can_decode:
            refusal = Refusal.WRONG_ROLE if submit.generation == self.generation else Refusal.STALE_GENERATION
            error = Output(request.request_id, 0, finish_reason=FinishReason.ERROR, refusal=refusal)
            outbox.put_nowait(WorkerFrame(self.generation, (error,)))
            return
        for position in range(len(request.replay_token_ids), request.params.max_tokens):
            if self.steps is not None:
                await self.steps.acquire()
            token = golden_token(request, position)
            is_last = position + 1 == request.params.max_tokens
            output = Output(
                request.request_id,
                position,
                (token,),
                golden_text(token),
                finish_reason=FinishReason.LENGTH if is_last else None,
                handoff=HandoffReport("p", self.worker_id, "local") if position == 0 else None,
            )
            outbox.put_nowait(WorkerFrame(self.generation, (output,), Load(num_free_blocks=1000, num_blocks=1000)))
            await asyncio.sleep(0)

    async def SetRole(self, request: Any, context: Any) -> Any:
        if request.generation not in (0, self.generation):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another generation")
        self.role = Role(request.role)
        self.generation += 1
        self.say(WorkerFrame(self.generation, status=self.status()))
        return wire.status_to_pb(self.status())

    async def SetDraining(self, request: Any, context: Any) -> Any:
        self.is_draining = request.is_draining
        self.say(WorkerFrame(self.generation, status=self.status()))
        return wire.status_to_pb(self.status())

    async def Describe(self, request: Any, context: Any) -> Any:
        return wire.status_to_pb(self.status())


__all__ = ["MODEL", "FakeWorker", "golden_text", "golden_token", "golden_tokens"]
