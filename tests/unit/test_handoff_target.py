"""The driver of a transfer's receiving end, where the stream to the sender does not behave."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from builders import fake_layout, make_request

from workers.errors import Refusal
from workers.handoff_target import HandoffFailed, TargetDriver
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.messages import OpenHandoff, Prompt
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.target import TargetSession
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
        subject=Prompt(make_request(range(5, 105))),
        first_block=0,
        num_blocks=2,
        transports=("shm",),
    )
    session = TargetSession(cut, opening, ttl_s=5)
    source = WorkerAddress("prefill-0", 1, "127.0.0.1:1")
    return TargetDriver(session, KvMemory(fake_layout()), {}, source, (3, 4), "t")


async def test_a_channel_that_another_transfer_has_closed_fails_the_transfer_and_does_not_leave_it_hanging() -> None:
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    stub = worker_pb2_grpc.WorkerStub(channel)
    await channel.close()
    transfer = driver()
    await transfer.run(stub)
    with pytest.raises(HandoffFailed) as failed:
        await asyncio.wait_for(transfer.outcome, 20)
    assert failed.value.refusal is Refusal.WORKER_LOST
