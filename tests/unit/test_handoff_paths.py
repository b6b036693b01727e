"""However a handoff ends, and whoever ends it at whichever step, both workers hold nothing afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest
from builders import fake_layout, generate_alone, make_request
from running_workers import CONFIG, Attached, idle, running, tokens

from workers.handoff.copier import describe_pieces
from workers.handoff.protobuf import down_from_pb, down_to_pb, up_from_pb, up_to_pb
from workers.handoff.protocol.messages import (
    CancelHandoff,
    HandoffAccepted,
    HandoffDown,
    HandoffRefused,
    HandoffUp,
    KvPieces,
    Offer,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    PrefixSubject,
    PromptSubject,
    ReleaseHandoff,
    RunningSubject,
    Subject,
    TransportBroken,
    UseTransport,
)
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.status import Role, WorkerAddress
from workers.transports.same_host import ShmTransport
from workers.wire.attach import Cancel
from workers.wire.streams import Sealer

REQUEST = make_request(range(5, 205), 12)
PROMPT = PromptSubject(REQUEST)
NUM_BLOCKS = 4
ME = WorkerAddress("by-hand", 7, "127.0.0.1:1")


def running_handoffs() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith(("fetch-", "source-", "target-"))]


# ---- a receiver by hand ----


class Receiver:
    """Speaks to a real sender, message by message."""

    def __init__(self, source: WorkerAddress, channel: grpc.aio.Channel) -> None:
        self._source = source
        self.call = worker_pb2_grpc.WorkerStub(channel).Handoff()
        self._sealer = Sealer()
        self.pieces: set[int] = set()
        self.heard: list[HandoffUp] = []

    async def say(self, message: HandoffDown, transfer_id: str = "t") -> None:
        await self.call.write(self._sealer.seal(down_to_pb(transfer_id, ME.generation, message)))

    async def open(self, subject: Subject = PROMPT, first_block: int = 0, num_blocks: int = NUM_BLOCKS) -> None:
        await self.say(
            OpenHandoff(
                target=ME,
                host="elsewhere",
                source_generation=self._source.generation,
                model_fingerprint="fake-1",
                layout=fake_layout(),
                subject=subject,
                first_block=first_block,
                num_blocks=num_blocks,
                transports=("shm", "grpc"),
            )
        )

    async def hear(self, kind: type) -> HandoffUp:
        """The first message of that kind, which may have come already: pieces and the first token overtake each other."""
        async with asyncio.timeout(30):
            while not (found := [message for message in self.heard if isinstance(message, kind)]):
                await self.hear_one()
        return found[0]

    async def hear_one(self) -> None:
        message = await self.call.read()
        assert message is not grpc.aio.EOF, f"the sender ended the stream after {self.heard}"
        for parsed in map(up_from_pb, (message, *message.then)):
            if isinstance(parsed, KvPieces):
                self.pieces |= {piece.piece for piece in parsed.pieces}
            if not isinstance(parsed, KvPieces) or parsed.pieces:
                self.heard.append(parsed)

    async def hear_end(self) -> None:
        async with asyncio.timeout(30):
            while await self.call.read() is not grpc.aio.EOF:
                pass


STEPS = ("open", "accepted", "used", "pieces", "done", "acknowledged")


async def go(receiver: Receiver, step: str) -> None:
    """A transfer up to a step."""
    await receiver.open()
    if step == "open":
        return
    accepted = await receiver.hear(HandoffAccepted)
    # No shared memory for another host.
    assert isinstance(accepted, HandoffAccepted) and [offer.transport for offer in accepted.offers] == ["grpc"]
    if step == "accepted":
        return
    await receiver.say(UseTransport("grpc"))
    if step == "used":
        return
    await receiver.hear(KvPieces)
    if step == "pieces":
        return
    await receiver.hear(PrefillDone)
    if step == "done":
        return
    while len(receiver.pieces) < NUM_BLOCKS:
        await receiver.hear_one()
    await receiver.say(PieceAck(tuple(receiver.pieces)))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("end", ["cut", "cancel", "half close", "nonsense"])
async def test_a_receiver_that_leaves_at_any_step_leaves_nothing_at_the_sender(step: str, end: str) -> None:
    async with (
        running("prefill-0", Role.PREFILL) as (worker, source),
        grpc.aio.insecure_channel(source.target) as channel,
    ):
        router = await Attached(source).start()
        receiver = Receiver(source, channel)
        await go(receiver, step)
        if end == "cut":
            receiver.call.cancel()
        elif end == "cancel":
            await receiver.say(CancelHandoff("changed my mind"))
            await receiver.hear_end()
        elif end == "half close":
            await receiver.call.done_writing()
            await receiver.hear_end()
        else:
            await receiver.say(PieceAck(), "another transfer")
            await receiver.hear_end()
        counters = await idle(worker)
        # A stream that is cut before it was served was never a handoff.
        assert counters.get("handoffs_not_taken", 0) + counters.get("handoffs_refused", 0) <= 1
        assert "handoffs_sent" not in counters and running_handoffs() == []
        await router.close()
        assert dict(worker.status().counters)["held_blocks"] == 0


async def test_a_receiver_that_takes_everything_releases_the_sender() -> None:
    async with (
        running("prefill-0", Role.PREFILL) as (worker, source),
        grpc.aio.insecure_channel(source.target) as channel,
    ):
        router = await Attached(source).start()
        receiver = Receiver(source, channel)
        await go(receiver, "acknowledged")
        await receiver.say(ReleaseHandoff())
        await receiver.hear_end()
        assert (await idle(worker))["handoffs_sent"] == 1
        await router.close()


async def test_a_receiver_that_falls_silent_expires() -> None:
    async with (
        running("prefill-0", Role.PREFILL, replace(CONFIG, transfer_timeout_s=1.5)) as (worker, source),
        grpc.aio.insecure_channel(source.target) as channel,
    ):
        router = await Attached(source).start()
        receiver = Receiver(source, channel)
        await go(receiver, "used")
        cancelled = await receiver.hear(CancelHandoff)
        assert isinstance(cancelled, CancelHandoff) and "silent" in cancelled.reason
        await idle(worker)
        await router.close()


@pytest.mark.parametrize(
    ("subject", "reason"),
    [(RunningSubject("r"), "no request r runs here"), (PrefixSubject((1, 2)), "2 blocks come with 0 tokens")],
)
async def test_what_a_worker_cannot_give_is_refused_with_the_reason(subject: Subject, reason: str) -> None:
    async with (
        running("prefill-0", Role.PREFILL) as (_, source),
        grpc.aio.insecure_channel(source.target) as channel,
    ):
        receiver = Receiver(source, channel)
        await receiver.open(subject)
        refused = await receiver.hear(HandoffRefused)
        assert isinstance(refused, HandoffRefused) and reason in refused.message
        await receiver.hear_end()


@pytest.mark.parametrize(("first_block", "num_blocks"), [(4, 0), (0, 3), (2, 4)])
async def test_a_prompt_must_fit_the_reservation(first_block: int, num_blocks: int) -> None:
    async with (
        running("prefill-0", Role.PREFILL) as (_, source),
        grpc.aio.insecure_channel(source.target) as channel,
    ):
        receiver = Receiver(source, channel)
        await receiver.open(first_block=first_block, num_blocks=num_blocks)
        assert isinstance(await receiver.hear(HandoffRefused), HandoffRefused)


# ---- a sender by hand ----


class Sender(worker_pb2_grpc.WorkerServicer):
    """Hands a prompt over as a real worker does, up to a step at which it misbehaves."""

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._memory = KvMemory(fake_layout(16))
        self._memory.bytes[:] = np.random.default_rng(1).integers(0, 256, self._memory.bytes.size, np.uint8)
        self._shm = ShmTransport(self._memory, "here")
        self.generation = 3
        self.ends: list[str] = []

    async def Handoff(
        self, request_iterator: AsyncIterator[pb.HandoffDown], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.HandoffUp]:
        first = await anext(request_iterator)
        opening = down_from_pb(first)
        assert isinstance(opening, OpenHandoff) and isinstance(opening.subject, PromptSubject)
        sealer = Sealer()

        def say(message: HandoffUp) -> pb.HandoffUp:
            return sealer.seal(up_to_pb(first.transfer_id, self.generation, message))

        cut = Cut(self._memory.layout, opening.first_block, opening.num_blocks)
        offer = self._shm.offer(opening.target, "here") or b""
        if self._fault == "dies at once":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield say(
            HandoffAccepted(
                (Offer("shm", b"nonsense" if self._fault == "cannot connect" else offer),), cut.layout, opening.host
            )
        )
        if self._fault == "cancels after accepting":
            yield say(CancelHandoff("no room"))
        if self._fault == "accepts twice":
            yield say(HandoffAccepted((Offer("shm", offer),), cut.layout, opening.host))
        if self._fault in ("dies after accepting", "cancels after accepting"):
            return
        async for message in request_iterator:
            down = down_from_pb(message)
            self.ends += [type(down).__name__] if isinstance(down, CancelHandoff | ReleaseHandoff) else []
            if isinstance(down, UseTransport):
                pieces = describe_pieces(self._memory, cut, [(n, n) for n in range(cut.num_pieces)])
                if self._fault == "speaks of another generation":
                    self.generation += 1
                if self._fault == "breaks its transport":
                    yield say(TransportBroken(down.epoch, "no socket"))
                elif self._fault == "announces what it has not":
                    yield say(KvPieces(tuple(pieces), down.epoch))
                    self._memory.bytes[:] = 0
                else:
                    yield say(KvPieces(tuple(pieces[:2]), down.epoch))
                if self._fault == "dies in the middle":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                if self._fault == "counts other pieces":
                    yield say(PrefillDone(7, None, 99, 0, 0.1))
                if self._fault == "ends in the middle":
                    return
            if isinstance(down, CancelHandoff):
                return


FAULTS = (
    "dies at once",
    "cannot connect",
    "dies after accepting",
    "cancels after accepting",
    "accepts twice",
    "dies in the middle",
    "ends in the middle",
    "breaks its transport",
    "speaks of another generation",
    "counts other pieces",
)


@asynccontextmanager
async def misbehaving(fault: str) -> AsyncIterator[tuple[Sender, WorkerAddress]]:
    sender = Sender(fault)
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(sender, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield sender, WorkerAddress("prefill-9", sender.generation, f"127.0.0.1:{port}")
    finally:
        await server.stop(0)
        await sender._shm.close()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_sender_that_fails_at_any_step_leaves_nothing_and_changes_no_token(fault: str) -> None:
    async with (
        misbehaving(fault) as (sender, source),
        running("decode-0", Role.DECODE) as (worker, address),
    ):
        router = await Attached(address).start()
        await router.submit(REQUEST, source)
        outputs = await router.finish("r")
        assert tokens(outputs) == generate_alone(REQUEST)
        report = outputs[0].handoff
        assert report is not None and (report.transport, report.recovery, report.attempts) == ("local", "local", 2)
        counters = await idle(worker)
        assert counters["handoffs_failed"] == 1 and running_handoffs() == []
        assert "ReleaseHandoff" not in sender.ends
        await router.close()


async def test_a_client_that_cancels_in_mid_transfer_cancels_it_at_the_sender() -> None:
    """The sender here never ends a prefill, so only the cancellation can."""
    async with misbehaving("none") as (sender, source), running("decode-0", Role.DECODE) as (worker, address):
        router = await Attached(address).start()
        await router.submit(REQUEST, source)
        await router.until(lambda: dict(worker.status().counters)["running_transfers"] > 0)
        await router.send(Cancel("r"))
        counters = await idle(worker)
        assert counters.get("handoffs_failed", 0) == 0 and running_handoffs() == []
        await router.close()
    assert "ReleaseHandoff" not in sender.ends


async def test_a_worker_that_stops_in_mid_transfer_waits_for_nobody() -> None:
    async with misbehaving("none") as (_, source):
        async with running("decode-0", Role.DECODE) as (worker, address):
            router = await Attached(address).start()
            await router.submit(REQUEST, source)
            await router.until(lambda: dict(worker.status().counters)["running_transfers"] > 0)
            await worker.stop()
            await router.close()
        assert running_handoffs() == []
