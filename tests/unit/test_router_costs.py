"""What an event makes a router look at does not grow with its workers and requests: counted, never timed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from router_story import FREE, GENERATION, MODEL, Story, request, submits, the_submit

from router.api.job_outputs import JobOutputs
from router.backend import RequestStream
from router.config import RouterConfig
from router.driver import RouterDriver
from router.events import RequestArrived, Tick
from router.fleet.fleet import Fleet
from router.fleet.worker_entry import WorkerEntry
from workers.kv_cache import block_hash
from workers.kv_cache.block_hash import PromptTokens, block_hashes
from workers.pb import worker_pb2 as pb
from workers.request import Output
from workers.status import KvEvent, Load, Role
from workers.wire import attach_protobuf as wire
from workers.wire import request_protobuf as wire_request
from workers.wire.attach import WorkerFrame


def fleet_of(num_workers: int, **settings: object) -> Story:
    """Half of the workers prefill."""
    roles = (Role.DECODE, Role.PREFILL)
    return Story(*[(f"w-{index:04}", roles[index % 2]) for index in range(num_workers)], **settings)


def run(story: Story, num_requests: int) -> None:
    """So many requests in mid-answer."""
    for index in range(num_requests):
        worker, submit = the_submit(story.tell(RequestArrived(request(f"q{index}", (1, 2, index)))))
        story.frame(worker, WorkerFrame(GENERATION, (Output(submit.request.request_id, 0, (7,), "a"),)))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each worker that anybody comes to in a walk over the fleet."""
    visited: list[str] = []
    iterate = Fleet.__iter__

    def watched(fleet: Fleet) -> Iterator[WorkerEntry]:
        for entry in iterate(fleet):
            visited.append(entry.worker_id)
            yield entry

    monkeypatch.setattr(Fleet, "__iter__", watched)
    return visited


async def test_a_job_of_many_choices_is_read_by_one_task_that_each_output_wakes_once() -> None:
    """There once were a task, two queues and two turns of the loop for each choice."""
    streams = [RequestStream(f"r{index}", 100, lambda request_id: None) for index in range(8)]
    backend: Any = type("Backend", (), {"submit": lambda self, request, *more: streams[int(request.request_id[1:])]})()
    num_tasks = len(asyncio.all_tasks())
    generation = await JobOutputs.open(backend, tuple(request(f"r{index}") for index in range(8)))
    reading = asyncio.create_task(generation.next_batch())
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == num_tasks + 1
    for index, stream in enumerate(streams):
        assert stream.push(Output(f"r{index}", 0, (7,), "a"))
    await asyncio.sleep(0)
    assert reading.done(), "in the next turn of the loop"
    assert [place for place, _ in reading.result()] == list(range(8))


def test_a_frame_is_read_without_asking_what_fields_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = tuple(Output(f"r{index}#1", 3, (7,), "a") for index in range(4))
    frame = WorkerFrame(GENERATION, outputs, Load(1, 2, 3, 4, 5, 6, 0.5))
    written = wire.frame_to_pb(frame).SerializeToString()

    def refuse(*args: object) -> None:
        raise AssertionError("this is asked for every token of every worker")

    for module in (wire, wire_request):
        monkeypatch.setattr(module, "from_fields", refuse)
        monkeypatch.setattr(module, "fields_of", refuse)
    assert wire.frame_from_pb(pb.WorkerFrame.FromString(written)) == frame


@pytest.mark.parametrize("num_workers", [2, 200])
def test_arrivals_frames_tokens_and_ticks_walk_over_no_fleet(num_workers: int, walks: list[str]) -> None:
    story = fleet_of(num_workers, pull_min_blocks=1)
    prompt = tuple(range(400))
    hashes = tuple(block_hashes(prompt, MODEL.block_size))
    for worker in story.connections:
        story.frame(worker, WorkerFrame(GENERATION, kv_events=(KvEvent(1, hashes),)))
    walks.clear()
    before = story.core.index.num_visited
    worker, _ = the_submit(story.tell(RequestArrived(request(prompt=prompt))))
    assert story.core.index.num_visited - before <= len(hashes), "one walk over the prompt, for all workers"
    story.frame(worker, WorkerFrame(GENERATION, load=FREE))
    story.output(worker, "r#1", 0, 5)
    story.tell(Tick())
    assert walks == []


def test_a_tick_looks_at_no_request_that_nothing_is_to_become_of() -> None:
    for num_requests in (10, 500):
        story = fleet_of(20)
        run(story, num_requests)
        flights, mover = story.core.flights, story.core.mover
        before = flights.num_visited, mover.num_visited
        story.tell(Tick())
        assert flights.num_visited - before[0] <= 1 and mover.num_visited == before[1]


def test_a_prefill_worker_is_not_one_that_must_be_left(walks: list[str]) -> None:
    """Each tick once walked over all running requests for each prefill worker."""
    story = fleet_of(20)
    run(story, 30)
    assert story.core.fleet.to_leave() == []
    worker = next(entry.worker_id for entry in story.core.fleet if entry.attempts)
    story.report(worker, Role.PREFILL, generation=GENERATION + 1)
    assert [entry.worker_id for entry in story.core.fleet.to_leave()] == [worker]


def test_a_worker_that_leaves_has_only_its_own_requests_looked_at() -> None:
    story = fleet_of(20)
    run(story, 300)
    entry = next(entry for entry in story.core.fleet if entry.attempts)
    num_there = len(entry.attempts)
    before = story.core.mover.num_visited
    story.report(entry.worker_id, Role.PREFILL, generation=GENERATION + 1)
    story.tell(Tick())
    assert story.core.mover.num_visited - before == num_there < 100


def test_while_nobody_can_decode_no_frame_looks_for_a_route() -> None:
    """An outage once became a meltdown: each load frame built the state of all workers anew."""
    story = fleet_of(20)
    for index in range(0, 20, 2):
        story.lose(f"w-{index:04}")
    for index in range(30):
        story.tell(RequestArrived(request(f"r{index}")))
    before = story.core.flights.num_tried
    for _ in range(50):
        story.frame("w-0001", WorkerFrame(GENERATION, load=Load(num_running=3)))
    assert story.core.flights.num_tried == before
    story.after(0.5)
    assert len(submits(story.report("w-0000", Role.DECODE))) == 30, "and all go as soon as somebody can"


def test_the_choices_of_one_request_are_hashed_and_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    story = fleet_of(20)
    hashed: list[int] = []
    digest = block_hash.xxhash.xxh3_64_intdigest

    def counted(data: bytes) -> int:
        hashed.append(len(data))
        return digest(data)

    monkeypatch.setattr(block_hash.xxhash, "xxh3_64_intdigest", counted)
    prompt = PromptTokens(range(400))
    before = story.core.index.num_visited
    for index in range(16):
        story.tell(RequestArrived(request(f"r{index}", prompt)))
    assert hashed.count(8 + 4 * MODEL.block_size) == 100, "once for each block"
    assert story.core.index.num_visited - before <= 100


def test_a_status_asks_no_worker_for_its_requests(walks: list[str]) -> None:
    for num_requests in (10, 200):
        story = fleet_of(20)
        run(story, num_requests)
        driver: Any = RouterDriver(RouterConfig(model="unused"), "router-0")
        driver._core = story.core
        walks.clear()
        status = driver.status()
        assert sum(view.num_requests for view in status.workers) == num_requests
        assert len(walks) == 20, "once over the workers, for they are what it tells of"
        assert all(a.status is b.status for a, b in zip(status.workers, driver.status().workers, strict=True))
