"""Real workers on a fake model, and a router's end of a stream to one, for tests that watch them from outside."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import grpc
from builders import FakeModel

from workers.config import WorkerConfig
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.request import Output, Request
from workers.status import Role, WorkerAddress, WorkerStatus
from workers.wire.attach import RouterHello, RouterMessage, Submit, WorkerFrame
from workers.wire.attach_protobuf import frame_from_pb, router_message_to_pb
from workers.wire.streams import Sealer
from workers.worker import Worker

CONFIG = WorkerConfig(
    model="fake",
    local_prefill_tokens=0,
    max_batch_tokens=96,
    max_num_seqs=16,
    transfer_timeout_s=5.0,
    transports=("shm", "grpc"),
)


_NUMBERS = itertools.count(1)


class Attached:
    """A router's end of one Attach stream, that keeps all it hears."""

    def __init__(self, address: WorkerAddress) -> None:
        self.address = address
        self.outputs: list[Output] = []
        self.status: WorkerStatus | None = None
        self._channel = grpc.aio.insecure_channel(address.target)
        self._call = worker_pb2_grpc.WorkerStub(self._channel).Attach()
        self._changed = asyncio.Condition()
        self._sealer = Sealer()

    async def start(self) -> Attached:
        await self.send(RouterHello(f"test-{next(_NUMBERS)}"))
        self._reader = asyncio.create_task(self._read())
        await self.until(lambda: self.status is not None)
        return self

    async def send(self, message: RouterMessage) -> None:
        await self.send_raw(router_message_to_pb(message))

    async def send_raw(self, message: pb.RouterMessage) -> None:
        await self._call.write(self._sealer.seal(message))

    async def submit(self, request: Request, *prefill: WorkerAddress, generation: int | None = None) -> None:
        await self.send(Submit(request, self.address.generation if generation is None else generation, prefill))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(condition), 20)

    async def finish(self, request_id: str) -> list[Output]:
        """All outputs of a request once it has ended."""
        await self.until(lambda: any(o.request_id == request_id and o.finish_reason for o in self.outputs))
        return [o for o in self.outputs if o.request_id == request_id]

    async def idle(self) -> WorkerStatus:
        """Waits until the worker says, from now on, that it holds nothing."""
        self.status = None
        await self.until(lambda: self.status is not None and holds_nothing(self.status))
        assert self.status is not None
        return self.status

    async def _read(self) -> None:
        async for message in self._call:
            frame: WorkerFrame = frame_from_pb(message)
            async with self._changed:
                self.outputs += frame.outputs
                self.status = frame.status or self.status
                self._changed.notify_all()

    async def close(self) -> None:
        self._reader.cancel()
        self._call.cancel()
        await self._channel.close()


def holds_nothing(status: WorkerStatus) -> bool:
    counters = dict(status.counters)
    return counters["held_blocks"] == 0 and counters["running_transfers"] == 0


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@asynccontextmanager
async def running(
    name: str, role: Role, config: WorkerConfig = CONFIG, start_count: int = 1, num_blocks: int = 64
) -> AsyncIterator[tuple[Worker, WorkerAddress]]:
    worker = Worker(config, name, start_count, role, load=partial(FakeModel, num_blocks=num_blocks))
    try:
        yield worker, await worker.start()
    finally:
        await worker.stop()


@asynccontextmanager
async def pair(
    prefill_config: WorkerConfig = CONFIG, decode_config: WorkerConfig = CONFIG
) -> AsyncIterator[tuple[Attached, WorkerAddress, Worker]]:
    """A prefill and a decode worker with pools of different sizes, and a router attached to the latter."""
    async with (
        running("prefill-0", Role.PREFILL, prefill_config, num_blocks=80) as (prefill, source),
        running("decode-0", Role.DECODE, decode_config) as (_, address),
    ):
        router = await Attached(address).start()
        try:
            yield router, source, prefill
        finally:
            await router.close()


async def idle(worker: Worker) -> dict[str, float]:
    """The counters of a worker once it holds nothing."""
    async with asyncio.timeout(30):
        while not holds_nothing(worker.status()):
            await asyncio.sleep(0.01)
    return dict(worker.status().counters)
