"""A sequence that makes a step fail fails alone, whatever it shares the step with; what cannot be computed is refused at the door."""

from __future__ import annotations

import math
from typing import Any

import pytest
from builders import (
    REPORT,
    fake_layout,
    fake_runner,
    generate_alone,
    make_engine,
    make_request,
    run_to_end,
    step_until,
    tokens_of,
)

from workers.engine.engine import MODEL_FAILED, Engine
from workers.engine.fake_runner import FakeRunner, LateFakeRunner, Postponed
from workers.engine.isolation import MAX_TRIES, isolate
from workers.errors import DeviceStuck, InvalidRequest, PoolsLost, Refusal
from workers.kv_memory.memory import KvMemory
from workers.request import FinishReason, Output, Request
from workers.runner import Batch, LayerHook, Sampled, SequenceSlice
from workers.scheduler.sequence import Kind

POISON = 666


def refuse(batch: Batch, token_id: int = POISON) -> None:
    """What a model does with a token that it has no embedding for."""
    if any(token_id in piece.token_ids for piece in (*batch.prefill, *batch.decode)):
        raise IndexError("secret internals")


class Poisonable(FakeRunner):
    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        self.num_steps += 1
        refuse(batch)
        return super().execute(batch, on_layer)


class PoisonableLate(LateFakeRunner):
    """Fails when it is waited for, as a device does, or when it is told."""

    at_launch = False

    def launch(self, batch: Batch, after: Postponed | None = None, on_layer: LayerHook | None = None) -> Postponed:
        self.num_steps += 1
        if self.at_launch:
            refuse(batch)
        return super().launch(batch, after, on_layer)

    def finish(self, launched: Postponed) -> list[Sampled]:
        refuse(launched.batch)
        return super().finish(launched)


class PoisonableAtLaunch(PoisonableLate):
    at_launch = True


RUNNERS = [Poisonable, PoisonableLate, PoisonableAtLaunch]
HEALTHY = [make_request(range(10 + 40 * i, 45 + 50 * i), 12, request_id=str(i)) for i in range(7)]
GOLDEN = [generate_alone(request, num_blocks=64) for request in HEALTHY]
BAD = make_request([5, 6, POISON, 8], 12)


def engine_on(kind: type[FakeRunner], **limits: Any) -> tuple[FakeRunner, Engine]:
    runner = kind(KvMemory(fake_layout(64)))
    return runner, make_engine(runner, **limits)


def ends(outputs: list[tuple[int, Output]]) -> dict[int, FinishReason]:
    found = [(owner, output.finish_reason) for owner, output in outputs if output.finish_reason is not None]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_only_the_poisonous_sequence_of_a_step_fails(kind: type[FakeRunner], steps_before: int) -> None:
    _, engine = engine_on(kind, max_batch_tokens=1024)
    outputs = []
    for i, request in enumerate(HEALTHY[:4]):
        engine.add(i, request)
    for _ in range(steps_before):
        outputs += engine.step().outputs
    engine.add(66, BAD)
    for i, request in enumerate(HEALTHY[4:], 4):
        engine.add(i, request)
    outputs += run_to_end(engine)
    assert [tokens_of(outputs, i) for i in range(7)] == GOLDEN
    assert ends(outputs).pop(66) is FinishReason.ERROR and len(ends(outputs)) == 8
    assert engine.num_held_blocks == 0


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_prompt_of_several_chunks_may_turn_out_poisonous_in_any_of_them(kind: type[FakeRunner]) -> None:
    _, engine = engine_on(kind, max_batch_tokens=64)
    engine.add(0, HEALTHY[0])
    engine.add(66, make_request([*range(10, 150), POISON], 5))
    engine.add(1, HEALTHY[1])
    outputs = run_to_end(engine)
    assert [tokens_of(outputs, i) for i in range(2)] == GOLDEN[:2]
    assert ends(outputs)[66] is FinishReason.ERROR and engine.num_held_blocks == 0


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_drawn_token_may_be_poisonous_too(kind: type[FakeRunner]) -> None:
    request = HEALTHY[2]
    drawn = GOLDEN[2][4]

    runner, engine = engine_on(kind)
    write = runner._write

    def refuse_drawn(piece: SequenceSlice) -> None:
        if piece.sequence_id == 2 and piece.start >= len(request.prompt_token_ids) and drawn in piece.token_ids:
            raise IndexError("secret internals")
        write(piece)

    runner._write = refuse_drawn  # type: ignore[method-assign]
    for i in range(4):
        engine.add(i, HEALTHY[i])
    outputs = run_to_end(engine)
    assert [tokens_of(outputs, i) for i in (0, 1, 3)] == [GOLDEN[i] for i in (0, 1, 3)]
    assert tokens_of(outputs, 2) == GOLDEN[2][:5] and ends(outputs)[2] is FinishReason.ERROR


def test_a_client_hears_that_the_model_failed_and_not_how() -> None:
    _, engine = engine_on(Poisonable)
    engine.add(66, BAD)
    ((_, output),) = run_to_end(engine)
    assert (output.refusal, output.message) == (Refusal.INTERNAL, MODEL_FAILED)


@pytest.mark.parametrize("kind", [FakeRunner, LateFakeRunner])
def test_a_runner_that_always_fails_is_not_tried_for_ever(kind: type[FakeRunner]) -> None:
    runner, engine = engine_on(kind, max_num_seqs=48, max_batch_tokens=1024)
    tries = 0

    def fail(batch: Batch, *rest: Any) -> list[Sampled]:
        nonlocal tries
        tries += 1
        raise RuntimeError("never")

    runner.execute = fail  # type: ignore[method-assign]
    if isinstance(runner, LateFakeRunner):
        runner.finish = fail  # type: ignore[method-assign, assignment]
    for i in range(40):
        engine.add(i, make_request([10 + i], 5))
    outputs = run_to_end(engine)
    assert len(outputs) == 40 and set(ends(outputs).values()) == {FinishReason.ERROR}
    assert tries <= 2 + MAX_TRIES  # a step may have been launched behind the first
    assert engine.num_held_blocks == 0


def test_one_bad_slice_of_many_is_found_in_a_few_tries() -> None:
    for bad in (0, 100, 255):
        tries = 0

        def run(part: range) -> list[Sampled]:
            nonlocal tries
            tries += 1
            if bad in part:  # noqa: B023
                raise ValueError
            return [Sampled(place, 7) for place in part]

        found = isolate(256, ValueError(), run)
        assert list(found.failed) == [bad] and len(found.drawn) == 255
        assert all(place == sampled.sequence_id for place, sampled in found.drawn.items())
        assert tries == 2 * math.log2(256)


@pytest.mark.parametrize("kind", [FakeRunner, LateFakeRunner])
def test_a_runner_that_is_broken_for_good_ends_the_engine_and_is_not_tried_again(kind: type[FakeRunner]) -> None:
    runner, engine = engine_on(kind)
    tries = 0

    def die(*rest: Any) -> list[Sampled]:
        nonlocal tries
        tries += 1
        raise DeviceStuck("device-side assert")

    runner.execute = die  # type: ignore[method-assign]
    if isinstance(runner, LateFakeRunner):
        runner.finish = die  # type: ignore[method-assign, assignment]
    for i in range(4):
        engine.add(i, HEALTHY[i])
    with pytest.raises(DeviceStuck):
        engine.step()
    assert tries == 1


def test_a_group_that_breaks_while_parts_are_tried_costs_that_part_alone() -> None:
    def run(part: range) -> list[Sampled]:
        if 1 in part:
            raise PoolsLost((), "a rank was lost")
        return [Sampled(place, 7) for place in part]

    found = isolate(8, RuntimeError(), run)
    assert sorted(found.failed) == [0, 1, 2, 3] and found.lost is not None and not found.drawn


@pytest.mark.parametrize("token_id", [-1, 1000, 1 << 40])
def test_tokens_outside_the_vocabulary_are_refused_wherever_they_come_from(token_id: int) -> None:
    request = make_request(range(10, 140), 20)
    engine = make_engine(fake_runner())
    with pytest.raises(InvalidRequest):
        engine.add(1, make_request([5, token_id], 5))
    with pytest.raises(InvalidRequest):
        engine.add(2, make_request([5], 5, replay=[7, token_id]))
    with pytest.raises(InvalidRequest):
        engine.incoming.add_migrant(3, Request("m", request.prompt_token_ids, request.params, 0, (token_id,)))

    engine.incoming.add_migrant(4, request)
    engine.incoming.moved_in(4, (7, token_id), len(request.prompt_token_ids) + 1)
    assert [output.refusal for _, output in engine.step().outputs] == [Refusal.NOT_MOVABLE]

    engine.add(5, request, Kind.TARGET)
    step_until(engine, "transfers")
    engine.incoming.landed(5, Sampled(5, token_id), 0, REPORT)
    assert tokens_of(run_to_end(engine), 5) == generate_alone(request)  # computed here instead
    assert engine.num_held_blocks == 0
