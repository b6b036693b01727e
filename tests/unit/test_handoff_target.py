"""The driver of a transfer's receiving end, where the stream to the sender does not behave."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

import grpc
import pytest
from builders import fake_layout, make_request

from cluster.logs import Formatter
from workers.errors import Refusal
from workers.handoff.protobuf import up_to_pb
from workers.handoff.protocol.messages import HandoffAccepted, HandoffFailed, Offer, OpenHandoff, PromptSubject
from workers.handoff.protocol.target_session import TargetSession
from workers.handoff.target_driver import TargetDriver
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2_grpc
from workers.status import WorkerAddress
from workers.wire.streams import Sealer


def driver(transports: Mapping[str, Any] = MappingProxyType({})) -> TargetDriver:
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
    return TargetDriver(session, KvMemory(fake_layout()), transports, source, (3, 4), "t", time.monotonic)


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


class AcceptingCall(BreakingCall):
    """A sender that offers shared memory, and then waits."""

    def __init__(self) -> None:
        super().__init__(grpc.aio.UsageError("over"), "never")

    async def write(self, message: object) -> None:
        return

    async def __aiter__(self) -> AsyncIterator[object]:
        accepted = HandoffAccepted((Offer("shm", b""),), fake_layout(), "here")
        yield Sealer().seal(up_to_pb("t", 1, accepted))
        await self._is_over.wait()


class BrokenTransport:
    """Says so itself, and then fails in a way that nobody expects."""

    async def connect(self, *_: object) -> None:
        logging.getLogger("workers.transports.shm").warning("the segment is gone")
        raise ValueError("never seen")


async def test_whatever_a_handoff_and_its_transport_log_names_the_request() -> None:
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(Formatter("decode-0", is_json=False))
    logging.getLogger("workers").addHandler(handler)
    transfer = driver({"shm": BrokenTransport()})
    try:
        await asyncio.wait_for(asyncio.create_task(transfer.run(BreakingStub(AcceptingCall()))), 60)  # type: ignore[arg-type]
        logging.getLogger("workers").warning("of no request")
    finally:
        logging.getLogger("workers").removeHandler(handler)
    with pytest.raises(HandoffFailed):
        await transfer.outcome
    lines = [line for line in said.getvalue().splitlines() if " decode-0 " in line]
    assert [line.partition(" decode-0 ")[2] for line in lines] == [
        "request_id=r the segment is gone", "request_id=r shm could not be connected", "of no request",
    ]  # fmt: skip
