"""Real workers with real gRPC between them, on a fake model: handoffs, faults, role switches."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import grpc
import pytest
from builders import FakeModel, generate_alone, make_request
from running_workers import CONFIG, Attached, pair, running, tokens

from workers.config import WorkerConfig
from workers.errors import Refusal
from workers.handoff import copier
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.request import FinishReason
from workers.serving.core import WorkerCore
from workers.serving.events import Tick
from workers.status import Role, WorkerAddress
from workers.wire.attach import Cancel, RouterHello, Submit
from workers.wire.attach_protobuf import router_message_to_pb, status_from_pb
from workers.wire.streams import Sealer
from workers.worker import Worker


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
    dead = WorkerAddress("prefill-9", 1 << 32, "127.0.0.1:1")
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
            described = (described[0]._replace(checksum=described[0].checksum ^ 1), *described[1:])
        return described

    monkeypatch.setattr("workers.handoff.source_driver.describe_pieces", spoil_once)
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


async def test_a_tick_that_fails_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, failures = WorkerCore.handle, []

    def fail_once(self, event, now):  # type: ignore[no-untyped-def]
        if isinstance(event, Tick) and len(failures) < 2:
            failures.append(event)
            raise RuntimeError("a tick that fails")
        return handle(self, event, now)

    async with running("mixed-0", Role.MIXED) as (_, address):
        router = await Attached(address).start()
        monkeypatch.setattr(WorkerCore, "handle", fail_once)
        await router.idle()
        await router.idle()
        assert len(failures) == 2
        await router.close()


SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1 << 16), ("grpc.http2.bdp_probe", 0))
"""A receiver that does not read holds its sender up after so many bytes."""


async def test_a_router_that_stops_reading_is_cut_off_while_a_write_to_it_waits() -> None:
    # Far more than comes in while a busy loop does something else, and far less than what is asked for.
    config = replace(CONFIG, max_pending_frames=64, orphan_grace_s=0.0)
    async with (
        running("mixed-0", Role.MIXED, config) as (_, address),
        grpc.aio.insecure_channel(address.target, options=SMALL_WINDOW) as channel,
    ):
        call = worker_pb2_grpc.WorkerStub(channel).Attach()
        sealer = Sealer()
        await call.write(sealer.seal(router_message_to_pb(RouterHello("stopped"))))
        is_written = False
        with contextlib.suppress(grpc.aio.AioRpcError):  # on a slow host it is cut off before all is written
            for index in range(12):
                request = make_request([index + 5] * 5, 3800, request_id=f"r{index}")
                await call.write(sealer.seal(router_message_to_pb(Submit(request, address.generation))))
            is_written = True
        other = await Attached(address).start()
        async with asyncio.timeout(60):
            while not dict((await other.idle()).counters).get("routers_cut"):
                pass
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async with asyncio.timeout(30):
                async for _ in call:  # what had been written before
                    pass
        # What grpc.aio says of a write that fails stands for the status that comes after it.
        assert ended.value.code() is (grpc.StatusCode.ABORTED if is_written else grpc.StatusCode.INTERNAL)
        request = make_request(range(5, 105), 20)
        await other.submit(request)
        assert tokens(await other.finish("r")) == generate_alone(request)
        await other.close()
