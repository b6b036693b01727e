"""The driver of a transfer's receiving end, where the stream to the sender does not behave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from builders import fake_layout, make_request

from workers.errors import Refusal
from workers.handoff.protocol.messages import HandoffFailed, OpenHandoff, PromptSubject
from workers.handoff.protocol.target_session import TargetSession
from workers.handoff.target_driver import TargetDriver
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2_grpc
from workers.status import WorkerAddress


def driver() -> TargetDriver:
    cut = Cut(fake_layout(), 0, 2)
    opening = OpenHandoff(
        target=WorkerAddress("decode-0", 1, "127.0.0.1:1"),
        host="here",
        source_generation=1,
        model_fingerprint="f",
        layout=fake_layout(),
        subject=PromptSubject(make_request(range(5, 105))),
        first_block=0,
        num_blocks=2,
        transports=("shm",),
    )
    session = TargetSession(cut, opening, ttl_s=5)
    source = WorkerAddress("prefill-0", 1, "127.0.0.1:1")
    return TargetDriver(session, KvMemory(fake_layout()), {}, source, (3, 4), "t", time.monotonic)


async def test_a_channel_that_another_transfer_has_closed_fails_the_transfer_and_does_not_leave_it_hanging() -> None:
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    stub = worker_pb2_grpc.WorkerStub(channel)
    await channel.close()
    transfer = driver()
    await transfer.run(stub)
    with pytest.raises(HandoffFailed) as failed:
        await asyncio.wait_for(transfer.outcome, 20)
    assert failed.value.refusal is Refusal.WORKER_LOST


class BreakingCall:
    """gRPC's side of a stream that breaks as it is written to, or as it is closed after the sender has ended it."""

    def __init__(self, error: Exception, breaks_at: str) -> None:
        self._error, self._breaks_at = error, breaks_at
        self._is_over = asyncio.Event()

    async def write(self, message: object) -> None:
        if self._breaks_at == "write":
            raise self._error
        self._is_over.set()

    async def done_writing(self) -> None:
        raise self._error

    async def __aiter__(self) -> AsyncIterator[object]:
        await self._is_over.wait()
        return
        yield

    def cancel(self) -> None:
        self._is_over.set()


class BreakingStub:
    def __init__(self, call: BreakingCall) -> None:
        self._call = call

    def Handoff(self) -> BreakingCall:
        return self._call


@pytest.mark.parametrize("breaks_at", ["write", "done_writing"])
@pytest.mark.parametrize(
    "error",
    [
        grpc.RpcError("the call is over"), grpc.aio.InternalError("a batch failed"), grpc.aio.UsageError("finished"),
        asyncio.InvalidStateError("half closed"), TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
async def test_whatever_grpc_raises_from_a_stream_that_breaks_the_sender_counts_as_lost(
    error: Exception, breaks_at: str
) -> None:
    transfer = driver()
    stub = BreakingStub(BreakingCall(error, breaks_at))
    await asyncio.wait_for(transfer.run(stub), 60)  # type: ignore[arg-type]
    with pytest.raises(HandoffFailed) as failed:
        await asyncio.wait_for(transfer.outcome, 60)
    assert failed.value.refusal is Refusal.WORKER_LOST
