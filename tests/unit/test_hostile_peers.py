"""What a stranger, or a process that has gone wrong, says to a worker or a router: one clear error, and nothing that grows with it."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from builders import FakeModel, make_request
from certificates import credentials
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from running_workers import CONFIG, Attached, idle, running

from router.requests.in_flight import InFlightRequest, Mismatch
from workers.errors import InvalidRequest, Refusal, TransferFailed, WorkerLost
from workers.handoff.protobuf import down_from_pb, down_to_pb, up_from_pb
from workers.handoff.protocol.messages import (
    CancelHandoff,
    HandoffAccepted,
    Offer,
    OpenHandoff,
    PrefixDone,
    PrefixSubject,
    RunningSubject,
    SequenceMoved,
)
from workers.handoff.protocol.source_session import Filled
from workers.handoff.protocol.target_session import Closed, Connected, Fail, SendDown, TargetSession
from workers.kv_memory.memory import JoinedKvMemory, KvLayout, KvMemory, MappedKvMemory, SharedHandle
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2 as pb
from workers.request import Output
from workers.status import PrefixHint, Role, WorkerAddress
from workers.token_logprobs import TokenLogprob
from workers.transports.grpc_stream import GrpcTransport
from workers.trust.channels import bind, make_server, open_channel
from workers.trust.parties import Kind, Party, router, worker
from workers.wire.attach import Submit
from workers.wire.attach_protobuf import frame_from_pb, router_message_from_pb
from workers.wire.grpc_client import GrpcWorkerClient, GrpcWorkerLink
from workers.wire.streams import HANDOFF_CHANNEL, Sealer
from workers.worker import Worker

EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "100"))
"""More for a longer run by hand."""
LAYOUT = KvLayout(16, 4, 2, 64, 64, "float32", 4)
NAN = float("nan")


# ---- what is said to routers ----


def _frame(**fields: Any) -> pb.WorkerFrame:
    return pb.WorkerFrame(generation=1, **fields)


def _status(**fields: Any) -> pb.WorkerStatus:
    model = fields.pop("model", pb.ModelInfo(name="m", vocab_size=9, max_model_len=99, block_size=64))
    return pb.WorkerStatus(worker_id="decode-0", role="decode", model=model, **fields)


BAD_FRAMES: dict[str, pb.WorkerFrame] = {
    "a logprob that is none": _frame(
        outputs=[pb.Output(token_ids=[1], logprobs=[pb.TokenLogprob(token_id=1, logprob=NAN)])]
    ),
    "an alternative's": _frame(
        outputs=[pb.Output(token_ids=[1], logprobs=[pb.TokenLogprob(top=[pb.TopLogprob(logprob=float("-inf"))])])]
    ),
    "scores that are none": _frame(
        outputs=[
            pb.Output(prompt_logprobs=[pb.PromptScores(token_ids=bytes(4), logprobs=b"\0\0\xc0\x7f", ranks=bytes(4))])
        ]
    ),
    "scores that do not belong together": _frame(
        outputs=[pb.Output(prompt_logprobs=[pb.PromptScores(token_ids=bytes(8), logprobs=bytes(4))])]
    ),
    "a handoff in no time": _frame(outputs=[pb.Output(token_ids=[1], handoff=pb.HandoffReport(transfer_s=NAN))]),
    "blocks of no tokens": _frame(status=_status(model=pb.ModelInfo(vocab_size=9, max_model_len=9))),
    "a counter that counts nothing": _frame(status=_status(counters=[pb.Counter(name="x", value=NAN)])),
    "more counters than there are": _frame(status=_status(counters=[pb.Counter(name=f"x{i}") for i in range(513)])),
    "an unknown role": _frame(status=pb.WorkerStatus(role="x", model=_status().model)),
    "an unknown end": _frame(outputs=[pb.Output(finish_reason="x")]),
    "an endless step": _frame(load=pb.Load(step_s=float("inf"))),
    "an unknown tier": _frame(kv_events=[pb.KvEvent(stored=[1], tiers=[7])]),
}


@pytest.mark.parametrize("what", BAD_FRAMES)
def test_a_frame_that_makes_no_sense_is_refused_as_it_is_read(what: str) -> None:
    with pytest.raises(ValueError):
        frame_from_pb(BAD_FRAMES[what])


def test_an_output_that_no_worker_can_mean_is_not_given_to_the_client() -> None:
    def flight() -> InFlightRequest:
        return InFlightRequest(make_request([1, 2], 4), 0, 0.0, 0.0)

    assert isinstance(flight().accept(Output("r", 0, (1, 2, 3, 4))), Output)
    assert flight().accept(Output("r", 0, (1,) * 5)) is Mismatch.IMPOSSIBLE
    assert flight().accept(Output("r", 0, (1, 2), logprobs=(TokenLogprob(1, -1.0),))) is Mismatch.IMPOSSIBLE


async def test_a_worker_that_calls_itself_by_anothers_name_is_lost() -> None:
    async with running("decode-0", Role.MIXED) as (_, address):
        link = GrpcWorkerLink(replace(address, worker_id="decode-1"), "router-0", 9, lambda: 0.0)
        with pytest.raises(WorkerLost, match="calls itself 'decode-0'"):
            async for _ in link.frames():
                pass
        await link.close()


# ---- what is said to workers ----


async def test_tokens_outside_the_vocabulary_are_replayed_by_nobody() -> None:
    async with running("decode-0", Role.MIXED) as (made, address):
        attached = await Attached(address).start()
        try:
            for request_id, replayed in (("outside", (2**31,)), ("longer", (1,) * 5)):
                await attached.submit(
                    replace(make_request([1, 2, 3], 4, request_id=request_id), replay_token_ids=replayed)
                )
                (output,) = await attached.finish(request_id)
                assert output.refusal is Refusal.INVALID
            await attached.submit(make_request([1, 2, 3], 4, request_id="good"))
            assert sum(len(output.token_ids) for output in await attached.finish("good")) == 4
        finally:
            await attached.close()
        await idle(made)


async def test_what_a_later_router_says_besides_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """One warning a stream, and nothing else comes of it."""
    caplog.set_level(logging.DEBUG, "workers.serving.streams")
    async with running("decode-0", Role.MIXED) as (_, address):
        attached = await Attached(address).start()
        try:
            for _ in range(3):
                await attached.send_raw(pb.RouterMessage())
            await attached.submit(make_request([1, 2, 3], 4, request_id="good"))
            assert sum(len(output.token_ids) for output in await attached.finish("good")) == 4
        finally:
            await attached.close()
    levels = [record.levelno for record in caplog.records if "sent a message that cannot be read" in record.message]
    assert levels == [logging.WARNING, logging.DEBUG, logging.DEBUG]


async def test_a_prefix_is_taken_from_members_only() -> None:
    """A hint names a worker that has no certificate of its name: nothing of its is published, the prompt is computed."""
    own = credentials(worker("decode-0"))
    async with running("stranger", Role.MIXED) as (_, stranger):
        made = Worker(CONFIG, "decode-0", 1, Role.MIXED, load=partial(FakeModel, num_blocks=64), credentials=own)
        address = await made.start()
        try:
            client = GrpcWorkerClient(credentials=credentials(router("router-0"), Party(Kind.ADMIN)))
            link = client.attach(address, "router-0")
            frames = link.frames()
            assert (await anext(frames)).status is not None
            prompt = list(range(1, 200))
            hint = PrefixHint(WorkerAddress("prefill-0", stranger.generation, stranger.target), 3)
            assert link.send(Submit(make_request(prompt, 2, request_id="r"), address.generation, prefix=hint))
            outputs: list[Output] = []
            while not (outputs and outputs[-1].finish_reason):
                outputs += (await anext(frames)).outputs
            assert outputs[0].cached_tokens == 0 and sum(len(o.token_ids) for o in outputs) == 2
            counters = await idle(made)
            assert counters["prefix_pulls"] == 1 == counters["prefix_pulls_failed"]
            await link.close()
        finally:
            await made.stop()


async def test_a_worker_gets_handoffs_and_kv_in_its_own_name_only() -> None:
    own, other = credentials(worker("decode-0")), credentials(worker("decode-2"))
    made = Worker(CONFIG, "decode-0", 1, Role.MIXED, load=partial(FakeModel, num_blocks=64), credentials=own)
    address = await made.start()
    transport = GrpcTransport(5.0)
    server = make_server((), own)
    server.add_generic_rpc_handlers(transport.handlers())
    target = f"127.0.0.1:{bind(server, '127.0.0.1', 0, own)}"
    await server.start()
    try:
        for claimed, reason in (("decode-1", "own name"), ("decode-2", "")):
            opening = replace(_opening(RunningSubject("r")), target=WorkerAddress(claimed, 1, "127.0.0.1:1"))
            envelope = Sealer().seal(down_to_pb("t", 1, opening))
            async with open_channel(address.target, HANDOFF_CHANNEL, other, worker("decode-0")) as channel:
                call = channel.stream_stream(
                    "/baton.workers.Worker/Handoff", response_deserializer=pb.HandoffUp.FromString
                )()
                await call.write(envelope.SerializeToString())
                said = (await call.read()).refused.message
            assert ("own name" in said) is bool(reason), said
        # The token of another worker's offer opens no stream of KV.
        for receiver, code in (("decode-1", grpc.StatusCode.PERMISSION_DENIED), ("decode-2", grpc.StatusCode.OK)):
            offer = transport.offer(WorkerAddress(receiver, 1, ""), "h")
            assert offer is not None
            token = bytes.fromhex(json.loads(offer)["token"])
            async with open_channel(target, HANDOFF_CHANNEL, other, worker("decode-0")) as channel:
                stream = channel.unary_stream("/baton.KvStream/Receive")(token)
                if code is grpc.StatusCode.OK:
                    assert await stream.read() == token[::-1]
                else:
                    assert await stream.code() is code
    finally:
        await server.stop(0)
        await transport.close()
        await made.stop()


def test_what_a_receiver_says_of_its_first_block_makes_nothing_large() -> None:
    """Filled carries the blocks alone; before, a table as long as the receiver liked was made."""
    first = 2**32 - 2
    filled = Filled((7,), first, first + 1, 4, first)
    assert filled.blocks[first - filled.offset] == 7


def _opening(subject: Any, num_blocks: int = 4) -> OpenHandoff:
    target = WorkerAddress("decode-0", 1, "127.0.0.1:1")
    return OpenHandoff(target, "h", 1, "m", LAYOUT, subject, 0, num_blocks, ("shm",))


@pytest.mark.parametrize(
    ("subject", "done"),
    [
        (RunningSubject("r"), SequenceMoved((1,), 65, 1)),
        (RunningSubject("r"), SequenceMoved((1,), 10**9, 4)),
        (PrefixSubject((1, 2)), PrefixDone(4, 0)),
    ],
)
def test_a_sender_that_counts_blocks_which_did_not_travel_is_given_up(subject: Any, done: Any) -> None:
    session = TargetSession(Cut(LAYOUT, 0, 4), _opening(subject), 30.0)
    session.open(0.0)
    session.handle(HandoffAccepted((Offer("shm", b""),), LAYOUT, "h"), 0.0)
    session.handle(Connected(0), 0.0)
    (told, _) = session.handle(done, 0.0)
    assert told == SendDown(CancelHandoff("the sender counts other blocks than pieces"))
    assert [type(command) for command in session.handle(Closed(), 0.0)] == [Fail]


# ---- shared memory ----


def test_a_pool_that_is_none_is_looked_at_and_not_waited_for(tmp_path: Path) -> None:
    memory = KvMemory(LAYOUT)
    size, nonce = memory.handle.num_bytes, memory.handle.nonce
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(plain, size)
    device = os.open("/dev/zero", os.O_RDONLY)
    folder = os.open(tmp_path, os.O_RDONLY)
    for fd in (pipe, plain, device, folder, 10**6, -1):
        with pytest.raises(TransferFailed):
            MappedKvMemory(SharedHandle(os.getpid(), fd, size, nonce), LAYOUT)
    with pytest.raises(TransferFailed, match="another nonce"):
        MappedKvMemory(replace(memory.handle, nonce=bytes(16)), LAYOUT)
    for fd in (pipe, plain, device, folder):
        os.close(fd)
    assert MappedKvMemory(memory.handle, LAYOUT).block(0, 0, 1).nbytes
    memory.close()


def test_a_protected_pool_is_written_by_its_owner_alone() -> None:
    memory = KvMemory(LAYOUT)
    JoinedKvMemory(memory.handle, LAYOUT).bytes[3] = 9
    memory.protect()
    memory.bytes[4] = 8
    assert list(MappedKvMemory(memory.handle, LAYOUT).block(0, 0, 1)[3:5]) == [9, 8]
    with pytest.raises(TransferFailed):
        JoinedKvMemory(memory.handle, LAYOUT)
    memory.close()


# ---- bytes ----


@given(data=st.binary(max_size=400))
@settings(max_examples=EXAMPLES)
def test_messages_of_any_bytes_are_read_or_refused(data: bytes) -> None:
    for kind, read in (
        (pb.RouterMessage, router_message_from_pb),
        (pb.WorkerFrame, frame_from_pb),
        (pb.HandoffDown, down_from_pb),
        (pb.HandoffUp, up_from_pb),
    ):
        try:
            message = kind.FromString(data)
        except DecodeError:
            continue
        try:
            read(message)  # type: ignore[operator]
        except (ValueError, TransferFailed, InvalidRequest):
            continue
