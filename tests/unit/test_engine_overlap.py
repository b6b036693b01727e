"""Steps that overlap give the tokens of steps that do not, on a runner that does nothing before it is waited for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.engine import Engine
from workers.engine.fake_runner import LateFakeRunner, Postponed
from workers.kv_memory.memory import KvMemory
from workers.request import FinishReason, Output, Request
from workers.runner import Batch, LayerHook, Sampled
from workers.scheduler.sequence import Kind


class Recorded(LateFakeRunner):
    """Writes down what it is told: the number of tokens of a launched batch, or 0 for a finish."""

    def __init__(self, num_blocks: int = 16) -> None:
        super().__init__(KvMemory(fake_layout(num_blocks)))
        self.calls: list[int] = []
        self.breaks_at = -1
        self.refuses_at = -1

    def launch(self, batch: Batch, after: Postponed | None = None, on_layer: LayerHook | None = None) -> Postponed:
        if len([c for c in self.calls if c]) == self.refuses_at:
            self.refuses_at = -1
            raise RuntimeError("no launch")
        self.calls.append(batch.num_tokens)
        return super().launch(batch, after, on_layer)

    def finish(self, launched: Postponed) -> list[Sampled]:
        self.calls.append(0)
        if self.calls.count(0) - 1 == self.breaks_at:
            raise RuntimeError("no finish")
        return super().finish(launched)

    @property
    def num_overlapped(self) -> int:
        """Launches while another step was running."""
        steps = [self.calls[:i] for i, call in enumerate(self.calls) if call]
        return sum(1 for before in steps if len(before) > 2 * before.count(0))


def outputs_alone(request: Request) -> list[Output]:
    """What a synchronous engine with nothing else to do says, but for the times it took."""
    engine = make_engine(fake_runner(), prefix_cache=False)
    engine.add(0, request)
    return [output._replace(handoff=None) for _, output in run_to_end(engine)]


def outputs_of(outputs: list[tuple[int, Output]], sequence_id: int) -> list[Output]:
    mine = [output for owner, output in outputs if owner == sequence_id]
    return [output._replace(handoff=None, cached_tokens=0) for output in mine]


def test_a_decode_step_is_launched_before_the_tokens_of_the_one_before_it_are_known() -> None:
    runner = Recorded()
    engine = make_engine(runner)
    engine.add(1, make_request(range(10, 110), max_tokens=20))
    assert tokens_of(run_to_end(engine), 1) == generate_alone(make_request(range(10, 110), max_tokens=20))
    assert runner.calls == [100, *[1, 0] * 19, 0]
    assert engine.num_held_blocks == 0


def test_each_step_returns_one_launched_step_and_a_prompt_goes_on_while_its_chunk_runs() -> None:
    runner = Recorded()
    engine = make_engine(runner, max_batch_tokens=64)
    engine.add(1, make_request(range(10, 160), max_tokens=3))
    assert engine.step().outputs == [] and runner.calls == [64, 64, 0]
    assert engine.step().outputs == [] and runner.calls[3:] == [22, 0]
    assert len(engine.step().outputs) == 1 and runner.calls[5:] == [1, 0]


def test_a_sequence_is_not_computed_beyond_its_length_but_once_beyond_a_stop_token() -> None:
    request = make_request(range(30), max_tokens=20)
    golden = generate_alone(request)
    runner = Recorded()
    engine = make_engine(runner)
    engine.add(1, make_request(range(30), max_tokens=20, stop_token_ids=(golden[4],)))
    assert tokens_of(run_to_end(engine), 1) == golden[:5]
    assert sum(runner.calls) == 30 + 5
    assert engine.num_held_blocks == 0


def test_blocks_of_a_cancelled_sequence_stay_its_own_until_the_running_step_is_done() -> None:
    engine = make_engine(Recorded())
    engine.add(1, make_request(range(100), max_tokens=50))
    for _ in range(5):
        engine.step()
    engine.cancel(1)
    engine.cancel(1)
    assert engine.num_held_blocks == 2 and engine.has_work
    engine.add(1, make_request(range(50, 90)))  # the id may be used again at once
    assert tokens_of(run_to_end(engine), 1) == generate_alone(make_request(range(50, 90)))
    assert engine.num_held_blocks == 0 and not engine.has_work


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"bad_words": ((7, 8),)},
    ],
)
def test_a_draw_that_looks_at_the_tokens_before_it_waits_for_them(params: dict[str, Any]) -> None:
    request = make_request(range(10, 40), max_tokens=10, **params)
    runner = Recorded()
    engine = make_engine(runner)
    engine.add(1, request)
    assert tokens_of(run_to_end(engine), 1) == generate_alone(request)
    assert runner.num_overlapped == 0
    assert len([call for call in runner.calls if call]) == 10


def test_known_tokens_are_replayed_without_waiting_whoever_looks_at_them() -> None:
    request = make_request(range(10, 40), max_tokens=10, repetition_penalty=1.2)
    golden = generate_alone(request)
    runner = Recorded()
    engine = make_engine(runner)
    engine.add(1, replace(request, replay_token_ids=tuple(golden[:6])))
    assert tokens_of(run_to_end(engine), 1) == golden[6:]
    assert runner.num_overlapped == 6


def test_a_prompt_for_another_worker_is_not_held_up_by_a_step_behind_it() -> None:
    request = make_request(range(300), max_tokens=100)
    source_runner, target_runner = Recorded(), Recorded()
    source, target = make_engine(source_runner), make_engine(target_runner)
    hand_over(source_runner, source, target_runner, target, request)
    outputs = run_to_end(target)
    assert source_runner.num_overlapped == 0 and target_runner.num_overlapped > 90
    assert tokens_of(outputs, 1) == generate_alone(request)
    report = outputs[0][1].handoff
    assert report is not None and replace(report, queue_s=REPORT.queue_s) == REPORT
    assert source.num_held_blocks == 0 and target.num_held_blocks == 0


def failing_at(fault: str, step: int) -> tuple[list[Output], list[Output]]:
    """What two sequences say, of which the first is alone in the step under way when the second comes and a fault happens."""
    runner = Recorded()
    engine = make_engine(runner, max_batch_tokens=40)
    healthy = make_request(range(50, 90), max_tokens=12)
    engine.add(1, make_request(range(30), max_tokens=50))
    outputs = [*engine.step().outputs, *engine.step().outputs]
    setattr(runner, fault, step)  # step 2 is under way, 3 the next to be launched
    engine.add(2, healthy)
    outputs += run_to_end(engine)
    engine.add(3, healthy)
    assert tokens_of(run_to_end(engine), 3) == tokens_of(outputs, 2) == generate_alone(healthy)
    assert engine.num_held_blocks == 0
    first, second = ([output for owner, output in outputs if owner == number] for number in (1, 2))
    return first, second


def test_a_step_that_fails_ends_its_sequence_once_and_no_other() -> None:
    first, second = failing_at("breaks_at", 2)
    assert [o.finish_reason for o in first if o.finish_reason] == [FinishReason.ERROR]
    assert second[-1].finish_reason is FinishReason.LENGTH


def test_a_step_that_could_not_be_launched_ahead_is_run_later() -> None:
    first, second = failing_at("refuses_at", 3)
    assert [token for output in first for token in output.token_ids] == generate_alone(
        make_request(range(30), max_tokens=50)
    )
    assert second[-1].finish_reason is FinishReason.LENGTH


def test_a_settled_engine_runs_no_step_and_loses_no_output() -> None:
    runner = Recorded()
    engine = make_engine(runner)
    engine.add(1, make_request(range(30), max_tokens=6))
    outputs = engine.step().outputs
    engine.settle()
    assert len([c for c in runner.calls if c]) == runner.calls.count(0)
    engine.settle()
    outputs += run_to_end(engine)
    assert tokens_of(outputs, 1) == generate_alone(make_request(range(30), max_tokens=6))


def test_an_engine_told_not_to_overlap_executes() -> None:
    runner = Recorded()
    engine = make_engine(runner, overlap_steps=False)
    engine.add(1, make_request(range(30)))
    run_to_end(engine)
    assert runner.num_overlapped == 0


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, Request, int, Kind]:
    """(step of arrival, request, steps until it is cancelled or a large number, kind)."""
    length = draw(st.integers(1, 260))
    shared = draw(st.sampled_from([0, 64, 128, 200]))
    index = draw(st.integers(0, 5))
    tokens = [(i if i < shared else i * 7 + index) % 990 + 5 for i in range(length)]
    request = make_request(
        tokens,
        max_tokens=draw(st.integers(1, 70)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.5])),
        logprobs=draw(st.sampled_from([None, 0])),
    )
    golden = generate_alone(request)
    if draw(st.booleans()):
        stop = golden[draw(st.integers(0, len(golden) - 1))]
        field = draw(st.sampled_from([{"stop_token_ids": (stop,)}, {"stop": (f"<{stop}>",)}]))
        request = replace(request, params=replace(request.params, **field))  # type: ignore[arg-type]
    if draw(st.integers(0, 3)) == 0:
        replayed = tokens_of([(0, o) for o in outputs_alone(request)], 0)
        request = replace(request, replay_token_ids=tuple(replayed[: draw(st.integers(0, len(replayed) - 1))]))
    patience = draw(st.sampled_from([10_000, 10_000, draw(st.integers(0, 40))]))
    return draw(st.integers(0, 40)), request, patience, draw(st.sampled_from([Kind.LOCAL, Kind.LOCAL, Kind.TARGET]))


def place_by_hand(engine: Engine, runner: LateFakeRunner, sequence_id: int, request: Request, first: int) -> None:
    """Writes the prompt into the blocks as a transfer does: at once, whatever steps are running."""
    blocks = engine._sequences.lives[sequence_id].sequence.table.blocks
    alone = fake_runner()
    computed = make_engine(alone, prefix_cache=False)
    computed.add(0, replace(request, replay_token_ids=()), Kind.SOURCE)
    while not (done := computed.step()).prefilled:
        pass
    filled = done.filled[-1].blocks
    for mine, theirs in list(zip(blocks, filled, strict=True))[first:]:
        runner.kv_memory.block(mine, 0, 2)[:] = alone.kv_memory.block(theirs, 0, 2)
    engine.incoming.landed(sequence_id, done.prefilled[0].sampled, 0, REPORT)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(jobs(), min_size=1, max_size=8), st.integers(6, 20), st.integers(1, 6), st.integers(8, 200), st.booleans()
)
def test_overlapping_changes_no_output_under_pressure_stops_cancels_replays_and_transfers(
    work: list[tuple[int, Request, int, Kind]], num_blocks: int, max_num_seqs: int, budget: int, cache: bool
) -> None:
    runner = Recorded(num_blocks)
    engine = make_engine(
        runner, max_num_seqs=max_num_seqs, max_batch_tokens=budget, prefix_cache=cache, local_prefill_tokens=30
    )
    outputs: list[tuple[int, Output]] = []
    for step in range(20_000):
        for index, (arrival, request, patience, kind) in enumerate(work):
            if step == arrival:
                engine.add(index, request, kind)
            if step == arrival + patience:
                engine.cancel(index)
        if not engine.has_work and step > 100:
            break
        result = engine.step()
        outputs += result.outputs
        for wanted in result.transfers:
            request = work[wanted.sequence_id][1]
            place_by_hand(engine, runner, wanted.sequence_id, request, wanted.first_block)
        for sequence_id in result.abandoned:
            engine.incoming.failed(sequence_id, REPORT)
    for index, (_, request, patience, _) in enumerate(work):
        expected, found = outputs_alone(request), outputs_of(outputs, index)
        assert found == expected if patience == 10_000 else found == expected[: len(found)]
    assert engine.num_held_blocks == 0 and not engine.has_work
