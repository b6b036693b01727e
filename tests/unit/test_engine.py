"""The engine's promises, on a runner whose tokens betray any wrong block."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from builders import (
    REPORT,
    fake_layout,
    fake_runner,
    generate_alone,
    hand_over,
    make_engine,
    make_request,
    run_to_end,
    step_until,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.fake_runner import FakeRunner
from workers.engine.messages import StepResult
from workers.errors import InvalidRequest, Refused
from workers.kv_memory.memory import KvMemory
from workers.request import FinishReason, Request
from workers.scheduler.sequence import Kind


def test_a_request_yields_max_tokens_and_leaves_no_block_held() -> None:
    engine = make_engine()
    engine.add(1, make_request(range(10, 110), max_tokens=70))
    outputs = run_to_end(engine)
    assert len(tokens_of(outputs, 1)) == 70
    assert [o.position for _, o in outputs] == list(range(70))
    assert [o.finish_reason for _, o in outputs if o.finish_reason] == [FinishReason.LENGTH]
    assert engine.num_held_blocks == 0


def test_the_second_request_with_a_prefix_reuses_blocks_and_gets_the_same_tokens() -> None:
    engine = make_engine()
    engine.add(1, make_request(range(200)))
    first = run_to_end(engine)
    engine.add(2, make_request(range(200)))
    second = run_to_end(engine)
    assert tokens_of(first, 1) == tokens_of(second, 2)
    assert first[0][1].cached_tokens == 0
    assert second[0][1].cached_tokens == 192


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    engine = make_engine()
    engine.add(1, make_request(range(128)))
    first = run_to_end(engine)
    engine.add(2, make_request(range(128)))
    second = run_to_end(engine)
    assert second[0][1].cached_tokens == 64
    assert tokens_of(first, 1) == tokens_of(second, 2)


def test_replayed_tokens_are_not_emitted_again_and_the_rest_is_unchanged() -> None:
    request = make_request(range(90), max_tokens=20)
    golden = generate_alone(request)
    engine = make_engine()
    engine.add(1, make_request(range(90), max_tokens=20, replay=golden[:7]))
    outputs = run_to_end(engine)
    assert tokens_of(outputs, 1) == golden[7:]
    assert outputs[0][1].position == 7
    assert outputs[0][1].text == f"<{golden[7]}>"


def test_stop_strings_cut_the_text_and_end_the_request() -> None:
    request = make_request(range(90), max_tokens=20)
    golden = generate_alone(request)
    engine = make_engine()
    engine.add(1, make_request(range(90), max_tokens=20, stop=(f"{golden[3]}><",)))
    outputs = run_to_end(engine)
    assert "".join(o.text for _, o in outputs) == "".join(f"<{t}>" for t in golden[:3]) + "<"
    assert outputs[-1][1].finish_reason is FinishReason.STOP
    assert outputs[-1][1].stop_reason == f"{golden[3]}><"
    assert engine.num_held_blocks == 0


def test_a_stop_token_id_ends_the_request_but_not_before_min_tokens() -> None:
    golden = generate_alone(make_request(range(30), max_tokens=20))
    engine = make_engine()
    engine.add(1, make_request(range(30), max_tokens=20, stop_token_ids=(golden[4],)))
    engine.add(2, make_request(range(30), max_tokens=20, min_tokens=10, stop_token_ids=(golden[4],)))
    outputs = run_to_end(engine)
    assert tokens_of(outputs, 1) == golden[:5]
    assert tokens_of(outputs, 2) == golden


def test_a_prompt_that_can_never_fit_is_refused_with_figures() -> None:
    engine = make_engine(fake_runner(4))
    with pytest.raises(InvalidRequest, match="5 KV blocks, the pool has 4"):
        engine.add(1, make_request(range(250), max_tokens=64))
    with pytest.raises(InvalidRequest, match="context holds 1024"):
        engine.add(1, make_request([5] * 1024))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.add(1, make_request([]))


def test_a_full_queue_refuses() -> None:
    engine = make_engine(max_queue=2)
    engine.add(1, make_request([5]))
    engine.add(2, make_request([5]))
    with pytest.raises(Refused, match="queue of 2"):
        engine.add(3, make_request([5]))


def test_cancel_frees_everything_at_every_stage() -> None:
    engine = make_engine()
    engine.add(1, make_request(range(500)))
    engine.cancel(1)
    engine.add(2, make_request(range(500)))
    engine.step()
    engine.cancel(2)
    engine.add(3, make_request(range(100), max_tokens=50))
    for _ in range(5):
        engine.step()
    engine.cancel(3)
    engine.cancel(3)
    assert engine.num_held_blocks == 0 and not engine.has_work


def test_a_cancelled_transfer_keeps_its_blocks_until_the_writers_have_stopped() -> None:
    engine = make_engine()
    engine.add(1, make_request(range(100)), Kind.TARGET)
    wanted = step_until(engine, "transfers").transfers[0]
    engine.cancel(1)
    assert step_until(engine, "abandoned").abandoned == [1]
    assert engine.num_held_blocks == len(wanted.blocks)
    engine.incoming.failed(1, REPORT)
    assert engine.num_held_blocks == 0


def test_a_failed_transfer_is_prefilled_locally_with_unchanged_tokens() -> None:
    request = make_request(range(100), max_tokens=12)
    engine = make_engine()
    engine.add(1, request, Kind.TARGET)
    step_until(engine, "transfers")
    engine.incoming.failed(1, REPORT)
    assert tokens_of(run_to_end(engine), 1) == generate_alone(request)


def test_a_handed_over_prompt_continues_with_the_tokens_of_one_worker() -> None:
    request = make_request(range(300), max_tokens=100)
    source_runner, target_runner = fake_runner(), fake_runner()
    source, target = make_engine(source_runner), make_engine(target_runner)
    hand_over(source_runner, source, target_runner, target, request)
    outputs = run_to_end(target)
    assert tokens_of(outputs, 1) == generate_alone(request)
    report = outputs[0][1].handoff
    assert report is not None and report == replace(REPORT, queue_s=report.queue_s)
    assert source.num_held_blocks == 0 and target.num_held_blocks == 0


class DeviceKvMemory(KvMemory):
    """`bytes` are what the model sees; a transfer sees a mirror of them, as with a pool in device memory."""

    def __init__(self) -> None:
        super().__init__(fake_layout())
        self._host = np.zeros((self.layout.num_blocks, self.layout.block_bytes), np.uint8)
        self._device = self.bytes.reshape(self._host.shape)

    def block(self, block_id: int, first_layer: int, num_layers: int) -> np.ndarray:
        return self._host[block_id]

    def expose(self, blocks: Sequence[int]) -> None:
        self._host[list(blocks)] = self._device[list(blocks)]

    def adopt(self, blocks: Sequence[int]) -> None:
        self._device[list(blocks)] = self._host[list(blocks)]


@pytest.mark.parametrize("shared", [0, 128])
def test_blocks_cross_between_pools_in_device_memory_also_behind_a_cached_prefix(shared: int) -> None:
    request = make_request(range(300), max_tokens=100)
    runners = [FakeRunner(DeviceKvMemory()) for _ in range(2)]
    source, target = (make_engine(runner) for runner in runners)
    if shared:
        source.add(3, make_request([*range(shared), 900], max_tokens=1))
        run_to_end(source)
    hand_over(runners[0], source, runners[1], target, request)
    assert tokens_of(run_to_end(target), 1) == generate_alone(request)


def test_a_runner_that_raises_fails_what_it_cannot_compute_and_goes_on() -> None:
    runner = fake_runner()
    engine = make_engine(runner)
    healthy = runner.execute
    runner.execute = lambda batch: (_ for _ in ()).throw(RuntimeError("boom"))  # type: ignore[method-assign,assignment]
    engine.add(1, make_request(range(20)))
    ((owner, output),) = engine.step().outputs
    assert owner == 1 and output.finish_reason is FinishReason.ERROR and "boom" not in output.message
    runner.execute = healthy  # type: ignore[method-assign]
    engine.add(2, make_request(range(20)))
    assert len(tokens_of(run_to_end(engine), 2)) == 8
    assert engine.num_held_blocks == 0


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(step of arrival, request) pairs with many shared prefixes."""
    size = draw(st.integers(1, 10))
    jobs = []
    for index in range(size):
        length = draw(st.integers(1, 260))
        shared = draw(st.sampled_from([0, 64, 128, 200]))
        tokens = [(i if i < shared else i * 7 + index) % 990 + 5 for i in range(length)]
        request = make_request(
            tokens,
            max_tokens=draw(st.integers(1, 90)),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(0, 3)),
        )
        jobs.append((draw(st.integers(0, 60)), request))
    return jobs


@settings(max_examples=60, deadline=None)
@given(workloads(), st.integers(6, 20), st.integers(1, 6), st.integers(8, 200), st.booleans())
def test_tokens_do_not_depend_on_company_chunking_pressure_or_preemption(
    jobs: list[tuple[int, Request]], num_blocks: int, max_num_seqs: int, budget: int, cache: bool
) -> None:
    engine = make_engine(
        fake_runner(num_blocks), max_num_seqs=max_num_seqs, max_batch_tokens=budget, prefix_cache=cache
    )
    outputs = []
    step = 0
    pending = sorted(enumerate(jobs), key=lambda item: item[1][0])
    while pending or engine.has_work:
        while pending and pending[0][1][0] <= step:
            index, (_, request) = pending.pop(0)
            engine.add(index, request)
        outputs += engine.step().outputs
        step += 1
        assert step < 20_000
    for index, (_, request) in enumerate(jobs):
        assert tokens_of(outputs, index) == generate_alone(request)
        positions = [o.position for owner, o in outputs if owner == index]
        assert positions == list(range(len(positions)))
    assert engine.num_held_blocks == 0


def test_preempted_requests_replay_their_tokens_unchanged() -> None:
    jobs = [make_request([i] * 60, max_tokens=100, temperature=1.0, seed=i) for i in range(5, 9)]
    engine = make_engine(fake_runner(8))
    for index, request in enumerate(jobs):
        engine.add(index, request)
    outputs = run_to_end(engine)
    counters = dict(engine.counters())
    assert counters["preemptions"] > 0 and counters["replayed_tokens"] > 0
    for index, request in enumerate(jobs):
        assert tokens_of(outputs, index) == generate_alone(request)


def test_a_replay_that_is_complete_ends_the_request_without_a_token() -> None:
    golden = generate_alone(make_request(range(90), max_tokens=5))
    engine = make_engine()
    engine.add(1, make_request(range(90), max_tokens=5, replay=golden))
    ((_, output),) = run_to_end(engine)
    assert (output.position, output.token_ids, output.finish_reason) == (5, (), FinishReason.LENGTH)
    assert engine.num_held_blocks == 0


def test_what_changes_right_behind_a_dump_of_the_cache_is_told_as_well() -> None:
    engine = make_engine()
    engine.add(1, make_request(range(10, 80)))
    engine.dump_cache()
    result = engine.step()
    dump, change = result.kv_dump, result.kv_event
    assert dump is not None and dump.reset and dump.stored == ()  # it knows nothing of the block that this step filled
    assert change is not None and len(change.stored) == 1


def test_a_dump_is_for_whoever_asks_and_takes_no_event_from_the_others() -> None:
    engine, events, told = make_engine(), [], set[int]()
    engine.add(1, make_request(range(10, 290), 8))

    def hear(result: StepResult) -> None:
        if result.kv_event is not None:
            events.append(result.kv_event)
            assert not result.kv_event.reset
            told.update(result.kv_event.stored)

    hear(engine.step())
    hear(engine.step())
    engine.dump_cache(7)
    engine.dump_cache(8)
    result = engine.step()
    hear(result)
    assert result.dump_askers == [7, 8] and result.kv_dump is not None and len(result.kv_dump.stored) >= 2
    while engine.has_work:
        hear(engine.step())
    engine.dump_cache(9)
    everything = engine.step().kv_dump
    assert everything is not None and set(everything.stored) == told and len(told) == 4


def test_an_engine_that_nobody_uses_gives_its_pool_back_at_once() -> None:
    gc.disable()  # a cycle would keep gigabytes until the collector comes by
    try:
        engine = make_engine()
        engine.add(1, make_request(range(100)))
        run_to_end(engine)
        engine.export(1, 0, 2)
        gone = weakref.ref(engine)
        del engine
        assert gone() is None
    finally:
        gc.enable()
