"""The router over real gRPC streams: tokens survive the death of their worker, and clients that leave cost nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from fake_worker import FakeWorker, golden_text, golden_tokens
from stream_reader import Reader

from router.backend import RequestStream
from router.config import RouterConfig
from router.driver import RouterDriver
from workers.errors import InvalidRequest, Refusal, Refused
from workers.request import FinishReason, Output, Request, SamplingParams
from workers.status import Role


def request(name: str = "r", max_tokens: int = 8) -> Request:
    return Request(name, (1, 2, 3, 4, 5), SamplingParams(max_tokens=max_tokens, seed=3))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@asynccontextmanager
async def cluster(*workers: FakeWorker, **settings: object) -> AsyncIterator[RouterDriver]:
    config = RouterConfig(model="unused", tick_s=0.02, **settings)  # type: ignore[arg-type]
    driver = RouterDriver(config, "router-0")
    await driver.start()
    driver.set_workers([await worker.start() for worker in workers])
    try:
        await until(lambda: len(driver.status().workers) == len(workers))
        yield driver
    finally:
        await driver.stop()
        for worker in workers:
            await worker.die()


async def read(stream: RequestStream | Reader) -> list[Output]:
    return [output async for output in (stream if isinstance(stream, Reader) else Reader(stream))]


def assert_golden(outputs: list[Output], wanted: Request) -> None:
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == golden_tokens(wanted)
    assert "".join(output.text for output in outputs) == "".join(golden_text(token) for token in tokens)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert {output.request_id for output in outputs} == {wanted.request_id}


async def test_a_request_streams_its_tokens() -> None:
    async with cluster(FakeWorker("w-0")) as driver:
        assert driver.is_ready() and driver.model is not None
        assert_golden(await read(driver.submit(request())), request())
        status = driver.status()
        assert (status.num_waiting, status.num_running, status.workers[0].num_requests) == (0, 0, 0)


async def test_a_stream_goes_on_with_the_same_tokens_when_its_worker_dies() -> None:
    workers = {name: FakeWorker(name) for name in ("w-0", "w-1")}
    for worker in workers.values():
        worker.steps = asyncio.Semaphore(3)
    async with cluster(*workers.values()) as driver:
        stream = Reader(driver.submit(request()))
        outputs: list[Output] = []
        while sum(len(output.token_ids) for output in outputs) < 3:
            outputs.append(await anext(stream))
        first = next(worker for worker in workers.values() if worker.submits)
        second = next(worker for worker in workers.values() if not worker.submits)
        second.steps = None
        await first.die()
        outputs += await read(stream)
        assert_golden(outputs, request())
        assert second.submits[0].request.replay_token_ids == tuple(golden_tokens(request())[:3])
        counters = dict(driver.status().counters)
        assert counters["reruns_worker_lost"] == 1 and counters["replayed_tokens"] == 3


async def test_a_lone_worker_that_comes_back_finishes_what_it_began() -> None:
    worker = FakeWorker("w-0")
    worker.steps = asyncio.Semaphore(2)
    async with cluster(worker) as driver:
        stream = Reader(driver.submit(request()))
        outputs = [await anext(stream)]
        await worker.die()
        await until(lambda: not driver.status().workers[0].connected)
        worker.generation += 1 << 32
        worker.steps = None
        driver.set_workers([await worker.start()])
        assert_golden(outputs + await read(stream), request())


async def test_a_client_that_leaves_cancels_its_request() -> None:
    worker = FakeWorker("w-0")
    worker.steps = asyncio.Semaphore(1)
    async with cluster(worker) as driver:
        stream = Reader(driver.submit(request()))
        await anext(stream)
        stream.close()
        await worker.cancelled.wait()
        assert worker.cancels == ["r#1"]
        assert driver.status().num_running == 0
        assert await read(stream) == []


async def test_a_reader_that_is_too_slow_is_cut_off() -> None:
    worker = FakeWorker("w-0")
    async with cluster(worker, max_buffered_tokens=4) as driver:
        stream = Reader(driver.submit(request(max_tokens=64)))
        await worker.cancelled.wait()
        outputs = await read(stream)
        assert outputs[-1].refusal is Refusal.DEADLINE_EXCEEDED
        assert outputs[0].token_ids == tuple(golden_tokens(request())[:4])


async def test_many_streams_at_once_stay_apart() -> None:
    async with cluster(FakeWorker("w-0"), FakeWorker("w-1")) as driver:
        requests = [request(f"r-{index}", 5 + index) for index in range(20)]
        streams = [driver.submit(one) for one in requests]
        for one, outputs in zip(requests, await asyncio.gather(*map(read, streams)), strict=True):
            assert_golden(outputs, one)


async def test_a_router_without_workers_refuses_at_once() -> None:
    async with cluster() as driver:
        assert not driver.is_ready()
        with pytest.raises(Refused) as refused:
            driver.submit(request())
        assert refused.value.refusal is Refusal.NO_WORKERS


async def test_a_request_that_could_not_be_taken_in_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(FakeWorker("w-0")) as driver:

        def break_down(*_: object) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as broken:
            broken.setattr(driver._core.flights, "arrive", break_down)
            with pytest.raises(RuntimeError, match="a bug"):
                driver.submit(request())
        assert_golden(await read(driver.submit(request())), request())


async def test_a_role_switch_is_made_and_seen() -> None:
    async with cluster(FakeWorker("w-0"), FakeWorker("w-1")) as driver:
        status = await driver.set_role("w-0", Role.PREFILL)
        assert status.role is Role.PREFILL
        outputs = await read(driver.submit(request()))
        assert outputs[0].handoff is not None and outputs[0].handoff.decode_worker == "w-1"


async def test_a_switch_that_would_leave_nobody_to_decode_is_refused() -> None:
    async with cluster(FakeWorker("w-0"), FakeWorker("w-1", Role.PREFILL)) as driver:
        with pytest.raises(InvalidRequest, match="decode"):
            await driver.set_role("w-0", Role.PREFILL)
        with pytest.raises(InvalidRequest, match="not connected"):
            await driver.set_role("w-9", Role.PREFILL)
        assert (await driver.set_role("w-0", Role.PREFILL, force=True)).role is Role.PREFILL
        assert not driver.is_ready()


async def test_a_drained_worker_gets_nothing_until_that_is_undone() -> None:
    async with cluster(FakeWorker("w-0"), FakeWorker("w-1")) as driver:
        assert (await driver.set_draining("w-0", True)).is_draining
        for index in range(4):
            outputs = await read(driver.submit(request(f"r{index}")))
            assert outputs[0].handoff is not None and outputs[0].handoff.decode_worker == "w-1"
        with pytest.raises(InvalidRequest, match="no worker could decode if 'w-1' were drained"):
            await driver.set_draining("w-1", True)
        with pytest.raises(InvalidRequest, match="not connected"):
            await driver.set_draining("w-9", True)
        assert not (await driver.set_draining("w-0", False)).is_draining
        assert (await driver.set_draining("w-1", True)).is_draining


async def test_stopping_ends_streams_and_leaves_nothing_behind() -> None:
    worker = FakeWorker("w-0")
    worker.steps = asyncio.Semaphore(1)
    before = len(asyncio.all_tasks()), threading.active_count()
    async with cluster(worker) as driver:
        stream = Reader(driver.submit(request()))
        await anext(stream)
        await driver.stop()
        outputs = await read(stream)
        assert outputs[-1].refusal is Refusal.SHUTTING_DOWN
        with pytest.raises(Refused):
            driver.submit(request("late"))
    await until(lambda: len(asyncio.all_tasks()) <= before[0])


def test_outputs_that_wait_become_one_and_each_is_copied_once() -> None:
    copied: list[int] = []

    class Tokens(tuple[int, ...]):
        """Tells when somebody goes through it."""

        def __iter__(self) -> Iterator[int]:
            copied.append(len(self))
            return super().__iter__()

    stream = RequestStream("r", 1000, lambda request_id: None)
    for position in range(1000):
        assert stream.push(Output("r", position, Tokens((position,)), f"<{position}>"))
    assert not stream.push(Output("r", 1000, (1000,)))
    stream.fail(Refusal.QUEUE_FULL, "too slow")
    output = stream.take(lambda: None)
    assert output is not None and output.position == 0 and output.token_ids == tuple(range(1000))
    assert output.text == "".join(f"<{token}>" for token in range(1000)) and output.refusal is Refusal.QUEUE_FULL
    assert copied == [1] * 1000


def test_a_reader_is_woken_once_for_all_that_comes_after_it_took_something() -> None:
    woken: list[int] = []
    left: list[str] = []
    stream = RequestStream("r", 8, left.append)
    assert stream.take(lambda: woken.append(1)) is None
    stream.push(Output("r", 0, (1,)))
    stream.push(Output("r", 1, (2,)))
    assert woken == [1]
    output = stream.take(lambda: woken.append(2))
    assert output is not None and output.token_ids == (1, 2)
    stream.push(Output("r", 2, (3,)))
    stream.push(Output("r", 3, (4,), finish_reason=FinishReason.LENGTH))
    assert woken == [1, 2]
    assert stream.take(lambda: None) is not None
    stream.close()
    assert left == []
