"""Real workers with real gRPC between them, on a fake model: handoffs, faults, role switches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import grpc
import pytest
from builders import FakeModel, generate_alone, make_request

from workers.client import Cancel, Hello, RouterMessage, Submit, WorkerFrame
from workers.config import WorkerConfig
from workers.errors import Refusal
from workers.kv_transfer import copier
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.request import FinishReason, Output, Request
from workers.router_session import RouterSession
from workers.status import Role, WorkerAddress, WorkerStatus
from workers.wire import frame_from_pb, router_message_to_pb, status_from_pb
from workers.worker import Worker

CONFIG = WorkerConfig(
    model="fake",
    local_prefill_tokens=0,
    max_batch_tokens=96,
    max_num_seqs=16,
    transfer_timeout_s=5.0,
    transports=("shm", "grpc"),
)


class Attached:
    """A router's end of one Attach stream, that keeps all it hears."""

    def __init__(self, address: WorkerAddress) -> None:
        self.address = address
        self.outputs: list[Output] = []
        self.status: WorkerStatus | None = None
        self._channel = grpc.aio.insecure_channel(address.target)
        self._call = worker_pb2_grpc.WorkerStub(self._channel).Attach()
        self._changed = asyncio.Condition()

    async def start(self) -> Attached:
        await self.send(Hello("test"))
        self._reader = asyncio.create_task(self._read())
        await self.until(lambda: self.status is not None)
        return self

    async def send(self, message: RouterMessage) -> None:
        await self._call.write(router_message_to_pb(message))

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


def with_transports(*transports: str) -> WorkerConfig:
    return WorkerConfig(
        model="fake", local_prefill_tokens=0, max_batch_tokens=96, max_num_seqs=16, transports=transports
    )


@pytest.mark.parametrize("transport", ["loopback", "shm", "tcp", "grpc"])
async def test_a_handoff_gives_the_tokens_of_one_worker_and_leaves_nothing(transport: str) -> None:
    config = with_transports(transport)
    async with pair(config, config) as (router, source, prefill):
        requests = [
            make_request([i + 5] * (50 * i + 1), 20, request_id=f"r{i}", temperature=float(i % 2), seed=i)
            for i in range(12)
        ]
        for request in requests:
            await router.submit(request, source)
        for request in requests:
            outputs = await router.finish(request.request_id)
            assert tokens(outputs) == generate_alone(request, 64)
            report = outputs[0].handoff
            assert report is not None and report.transport == transport and report.prefill_worker == "prefill-0"
            assert report.kv_bytes > 0
        status = await router.idle()
        assert dict(status.counters)[f"handoffs_landed_{transport}"] == 12
        assert dict(prefill.status().counters)["handoffs_sent"] == 12


async def test_transports_are_negotiated_and_without_a_common_one_decode_prefills_itself() -> None:
    request = make_request(range(5, 205), 20)
    async with pair(with_transports("grpc"), with_transports("shm", "grpc")) as (router, source, _):
        await router.submit(request, source)
        outputs = await router.finish("r")
        assert outputs[0].handoff is not None and outputs[0].handoff.transport == "grpc"
    async with pair(with_transports("grpc"), with_transports("shm")) as (router, source, _):
        await router.submit(request, source)
        outputs = await router.finish("r")
        assert tokens(outputs) == generate_alone(request)
        assert outputs[0].handoff is not None and outputs[0].handoff.transport == "local"


async def test_a_prefix_that_decode_holds_is_not_sent_again() -> None:
    async with pair() as (router, source, _):
        await router.submit(make_request(range(5, 305), 4, request_id="a"), source)
        first = await router.finish("a")
        await router.submit(make_request(range(5, 405), 4, request_id="b"), source)
        second = await router.finish("b")
        assert first[0].handoff is not None and second[0].handoff is not None
        assert first[0].handoff.kv_bytes == 5 * 2048 and second[0].handoff.kv_bytes == 3 * 2048
        assert (first[0].cached_tokens, second[0].cached_tokens) == (0, 256)
        assert tokens(second) == generate_alone(make_request(range(5, 405), 4))


async def test_a_dead_prefill_worker_is_replaced_by_the_next_and_then_by_decode_itself() -> None:
    request = make_request(range(5, 205), 20)
    dead = WorkerAddress("prefill-9", 1 << 16, "127.0.0.1:1")
    async with pair() as (router, source, _):
        await router.submit(request, dead, source)
        outputs = await router.finish("r")
        assert tokens(outputs) == generate_alone(request)
        assert outputs[0].handoff is not None
        assert (outputs[0].handoff.prefill_worker, outputs[0].handoff.attempts) == ("prefill-0", 2)
        assert outputs[0].handoff.recovery == "next_source"
        alone = make_request(range(100, 300), 20, request_id="alone")
        await router.submit(alone, dead)
        outputs = await router.finish("alone")
        assert tokens(outputs) == generate_alone(alone)
        assert outputs[0].handoff is not None and outputs[0].handoff.transport == "local"
        assert (outputs[0].handoff.attempts, outputs[0].handoff.recovery) == (2, "local")
        counters = dict((await router.idle()).counters)
        assert (counters["recovery_next_source"], counters["recovery_local"]) == (1, 1)


async def test_a_stale_generation_is_refused_at_both_ends() -> None:
    async with pair() as (router, source, _):
        await router.submit(make_request(range(5, 100), 4), generation=7)
        (output,) = await router.finish("r")
        assert output.refusal is Refusal.STALE_GENERATION
        old = WorkerAddress(source.worker_id, source.generation - 1, source.target)
        await router.submit(make_request(range(5, 100), 4, request_id="old"), old)
        outputs = await router.finish("old")
        assert outputs[0].handoff is not None and outputs[0].handoff.transport == "local"
        assert dict((await router.idle()).counters)["handoffs_failed"] == 1


async def test_corrupted_pieces_never_reach_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(range(5, 305), 20)
    describe = copier.describe_pieces
    spoiled: list[int] = []

    def spoil_once(memory, cut, pieces):  # type: ignore[no-untyped-def]
        described = describe(memory, cut, pieces)
        if not spoiled:
            spoiled.append(described[0].piece)
            described = (replace(described[0], checksum=described[0].checksum ^ 1), *described[1:])
        return described

    monkeypatch.setattr("workers.handoff_source.describe_pieces", spoil_once)
    async with pair() as (router, source, _):
        await router.submit(request, source)
        outputs = await router.finish("r")
        assert tokens(outputs) == generate_alone(request)
        report = outputs[0].handoff
        assert spoiled and report is not None and report.transport == "grpc"
        assert (report.degradations, report.recovery, report.attempts) == (1, "next_transport", 1)
        assert report.resends >= 1 and report.transfer_s > 0
        assert dict((await router.idle()).counters)["recovery_next_transport"] == 1


async def test_cancel_frees_both_workers_at_any_moment() -> None:
    async with pair() as (router, source, _):
        for index in range(30):
            request = make_request([index + 5] * 900, 500, request_id=f"c{index}")
            await router.submit(request, source)
            for _ in range(index % 7):
                await asyncio.sleep(0)
            if index % 3 == 0:
                await router.until(lambda i=index: any(o.request_id == f"c{i}" for o in router.outputs))
            await router.send(Cancel(f"c{index}"))
        await router.idle()
        other = await Attached(source).start()
        await other.idle()
        await other.close()


async def test_a_router_that_goes_away_frees_its_requests() -> None:
    async with pair() as (router, source, _):
        await router.submit(make_request(range(5, 905), 3000), source)
        await router.until(lambda: bool(router.outputs))
        second = await Attached(router.address).start()
        await router.close()
        await second.idle()
        await second.close()


async def test_a_role_switch_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async with pair() as (router, source, _):
        request = make_request(range(5, 205), 400)
        await router.submit(request, source)
        await router.until(lambda: bool(router.outputs))
        async with grpc.aio.insecure_channel(router.address.target) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            status = status_from_pb(await stub.SetRole(pb.SetRoleRequest(role="prefill")))
        assert status.role is Role.PREFILL and status.generation == router.address.generation + 1
        await router.submit(make_request(range(5), 4, request_id="late"), generation=status.generation)
        (refused,) = await router.finish("late")
        assert refused.refusal is Refusal.WRONG_ROLE
        assert tokens(await router.finish("r")) == generate_alone(request)


async def test_a_worker_that_stops_says_so_to_its_router() -> None:
    worker = Worker(CONFIG, "mixed-0", 1, Role.MIXED, load=FakeModel)
    router = await Attached(await worker.start()).start()
    await router.submit(make_request(range(5, 205), 3000))
    await router.until(lambda: bool(router.outputs))
    await worker.stop()
    last = (await router.finish("r"))[-1]
    assert last.finish_reason is FinishReason.ERROR and last.refusal is Refusal.SHUTTING_DOWN
    await router.close()


async def test_what_a_stopping_worker_says_while_a_frame_is_being_written_is_still_said() -> None:
    session = RouterSession("router", max_pending_outputs=8)
    session.add_output(Output("r", 0, (1,)))
    await session.next_frame(1)  # the frame is on its way out when the worker stops
    session.add_output(Output("r", 1, (2,)))
    session.close()
    assert not session.has_ended
    frame = await session.next_frame(1)
    assert [output.token_ids for output in frame.outputs] == [(2,)] and session.has_ended
