"""A sequence that moves between two engines in the middle of its decoding keeps its tokens, its text and its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from builders import REPORT, fake_runner, generate_alone, make_engine, make_request, run_to_end, tokens_of
from byte_tokens import vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.engine import Engine
from workers.engine.fake_runner import FakeRunner
from workers.engine.messages import BlocksFinal, ExportEnded, Halted, StepResult, TransferWanted
from workers.errors import Refusal, Refused
from workers.request import FinishReason, Output, Request


@dataclass
class Move:
    """Two engines and one migration between them, carried out by hand."""

    source_blocks: int = 16
    target_blocks: int = 16
    source_runner: FakeRunner = field(init=False)
    target_runner: FakeRunner = field(init=False)
    source: Engine = field(init=False)
    target: Engine = field(init=False)
    outputs: list[tuple[int, Output]] = field(default_factory=list)
    arrived: list[tuple[int, Output]] = field(default_factory=list)
    wanted: TransferWanted | None = None
    halted: Halted | None = None
    ended: ExportEnded | None = None
    num_copied: int = 0

    def __post_init__(self) -> None:
        self.source_runner, self.target_runner = fake_runner(self.source_blocks), fake_runner(self.target_blocks)
        known = vocabulary()
        self.source = make_engine(self.source_runner, vocabulary=known)
        self.target = make_engine(self.target_runner, vocabulary=known)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.take(self.source.step())

    def take(self, result: StepResult) -> None:
        self.outputs += result.outputs
        for event in result.exports:
            match event:
                case BlocksFinal():
                    self.copy(event)
                case Halted():
                    self.halted = event
                case ExportEnded():
                    self.ended = event

    def copy(self, event: BlocksFinal) -> None:
        assert self.wanted is not None
        for index in range(event.first, event.end):
            home = self.target_runner.kv_memory.block(self.wanted.blocks[index], 0, 2)
            home[:] = self.source_runner.kv_memory.block(event.blocks[index], 0, 2)
            self.num_copied += 1

    def begin(self, request: Request, sequence_id: int = 1) -> None:
        """Reserves at the target with what the client has, and opens the export."""
        delivered = tokens_of(self.outputs, sequence_id)
        replay = make_request(request.prompt_token_ids, replay=delivered).replay_token_ids
        again = Request("t", request.prompt_token_ids, request.params, request.choice_index, replay)
        self.target.incoming.add_migrant(9, again)
        (self.wanted,) = self.target.step().transfers
        self.source.export(sequence_id, self.wanted.first_block, len(self.wanted.blocks))

    def land(self) -> None:
        assert self.halted is not None
        self.target.incoming.moved_in(9, self.halted.known_token_ids, self.halted.num_computed)
        self.source.moves.end(self.halted.sequence_id)
        self.take(self.source.step())

    def finish(self) -> list[tuple[int, Output]]:
        self.arrived = run_to_end(self.target)
        return self.arrived


def start(move: Move, request: Request, num_steps: int) -> None:
    move.source.add(1, request)
    move.run(num_steps)


@pytest.mark.parametrize("num_steps", [3, 40, 130])
def test_a_moved_sequence_goes_on_with_the_tokens_of_one_worker(num_steps: int) -> None:
    request = make_request(range(10, 210), max_tokens=250, temperature=1.0, seed=5)
    move = Move()
    start(move, request, num_steps)
    move.begin(request)
    move.run(5)
    assert move.halted is None, "it goes on while it is copied"
    move.source.moves.halt(1)
    move.run(3)
    assert move.halted is not None
    position = len(tokens_of(move.outputs, 1))
    move.land()
    (moved,) = [o for _, o in move.outputs if o.finish_reason is FinishReason.MOVED]
    assert moved.position == position == len(move.halted.known_token_ids)
    arrived = move.finish()
    assert arrived[0][1].position == position
    assert tokens_of(move.outputs, 1) + tokens_of(arrived, 9) == generate_alone(request)
    assert move.source.num_held_blocks == move.target.num_held_blocks == 0


def test_full_blocks_are_copied_once_and_only_the_last_ones_while_it_stands_still() -> None:
    request = make_request(range(10, 210), max_tokens=300)
    move = Move()
    start(move, request, 10)
    move.begin(request)
    move.run(80)
    before = move.num_copied
    assert before == 4
    move.source.moves.halt(1)
    move.run(1)
    assert move.halted is not None and move.num_copied == before + 1


def test_a_prefix_that_the_target_caches_is_not_copied_and_the_prompt_is_cached_afterwards() -> None:
    request = make_request(range(300), max_tokens=60)
    move = Move()
    move.target.add(5, make_request(range(200), max_tokens=1))
    run_to_end(move.target)
    start(move, request, 8)
    move.begin(request)
    assert move.wanted is not None and move.wanted.first_block == 3
    move.source.moves.halt(1)
    move.run(1)
    move.land()
    assert tokens_of(move.outputs, 1) + tokens_of(move.finish(), 9) == generate_alone(request)
    move.target.add(6, make_request(range(300), max_tokens=4))
    assert run_to_end(move.target)[0][1].cached_tokens == 256, "prompt blocks only; what decode wrote is never shared"


def test_text_and_stop_strings_span_the_move() -> None:
    golden = generate_alone(make_request(range(90), max_tokens=60))
    stop = f"{golden[20]}><{golden[21]}"
    request = make_request(range(90), max_tokens=60, stop=(stop,), logprobs=0, choice_index=0)
    alone = make_engine()
    alone.add(1, request)
    expected = [o for _, o in run_to_end(alone)]
    move = Move()
    start(move, request, 1)
    while len(tokens_of(move.outputs, 1)) < 21:  # the stop string has begun
        move.run(1)
    move.begin(request)
    move.source.moves.halt(1)
    move.target.step()
    early = move.source.take_early()
    assert early is not None, "it stands still before the next step"
    move.take(early)
    move.land()
    got = [o for _, o in move.outputs if o.finish_reason is None] + [o for _, o in move.finish()]
    assert "".join(o.text for o in got) == "".join(o.text for o in expected)
    assert got[-1].stop_reason == stop and [o.logprobs for o in got] == [o.logprobs for o in expected]


def test_a_failed_migration_lets_the_sequence_go_on_where_it_stood() -> None:
    request = make_request(range(10, 210), max_tokens=120)
    move = Move()
    start(move, request, 10)
    for _ in range(3):
        move.begin(request)
        move.run(4)
        move.source.moves.halt(1)
        move.run(2)
        assert move.halted is not None
        move.halted = None
        move.source.moves.resume(1)
        move.target.incoming.failed(9, REPORT)
        (refused,) = move.target.step().outputs
        assert refused[1].refusal is Refusal.NOT_MOVABLE
        assert move.target.num_held_blocks == 0
    outputs = move.outputs + run_to_end(move.source)
    assert tokens_of(outputs, 1) == generate_alone(request)


def test_what_cannot_move_is_refused_and_stays() -> None:
    request = make_request(range(10, 210), max_tokens=20)
    move = Move()
    move.source.export(77, 0, 9)
    move.run(1)
    assert move.ended == ExportEnded(77, "the sequence has ended")
    move.source.add(1, request)
    move.source.export(1, 0, 9)
    move.run(1)
    assert move.ended is not None and "not decoding" in move.ended.reason
    move.run(3)
    move.source.export(1, 0, 2)
    move.run(1)
    assert "longer than the 2 blocks" in move.ended.reason
    assert tokens_of(move.outputs + run_to_end(move.source), 1) == generate_alone(request)


def test_a_sequence_that_ends_or_is_cancelled_while_it_moves_ends_the_migration() -> None:
    move = Move()
    request = make_request(range(10, 110), max_tokens=12)
    start(move, request, 4)
    move.begin(request)
    move.run(30)
    assert move.ended == ExportEnded(1, "the sequence has ended") and move.source.num_held_blocks == 0
    assert tokens_of(move.outputs, 1) == generate_alone(request)
    other = Move()
    start(other, request, 4)
    other.begin(request)
    other.source.moves.halt(1)
    other.run(1)
    assert other.halted is not None
    other.source.cancel(1)
    other.run(1)
    assert other.ended is not None and other.source.num_held_blocks == 0
    other.source.moves.end(1)
    assert not other.source.has_work


def test_a_sequence_that_outgrows_its_room_before_it_is_copied_stays() -> None:
    move = Move()
    request = make_request(range(10, 100), max_tokens=500)
    start(move, request, 4)
    move.begin(request)
    move.run(330)
    assert move.ended is not None and "outgrew" in move.ended.reason
    assert tokens_of(move.outputs + run_to_end(move.source), 1) == generate_alone(request)


def test_a_target_without_room_refuses_at_once_and_takes_nothing() -> None:
    move = Move(target_blocks=4)
    move.target.add(1, make_request(range(10, 100), max_tokens=20))
    move.target.step()
    with pytest.raises(Refused) as error:
        move.target.incoming.add_migrant(9, make_request(range(10, 150), max_tokens=20))
    assert error.value.refusal is Refusal.QUEUE_FULL and move.target.num_held_blocks == 2


def test_preemption_prefers_what_is_not_being_moved_and_ends_a_migration_otherwise() -> None:
    jobs = {index: make_request([index + 20] * 100, max_tokens=200) for index in range(2)}
    move = Move(source_blocks=7)
    for index, request in jobs.items():
        move.source.add(index, request)
    move.run(10)
    move.begin(jobs[1], 1)
    move.run(130)
    assert move.ended is None and dict(move.source.counters())["preemptions"] == 1, "the older one gave its blocks"
    move.source.moves.halt(1)
    move.run(1)
    assert move.halted is not None
    move.land()
    moved = tokens_of(run_to_end(move.target), 9)
    both = Move(source_blocks=7)
    for index, request in jobs.items():
        both.source.add(index, request)
    both.run(10)
    both.wanted = TransferWanted(9, 0, tuple(range(16)))
    for index in jobs:
        both.source.export(index, 0, 16)
    both.run(130)
    assert both.ended == ExportEnded(1, "the sequence was preempted")
    for story, tail in ((move, moved), (both, [])):
        story.outputs += run_to_end(story.source)
        for index, request in jobs.items():
            assert tokens_of(story.outputs, index) + (tail if index else []) == generate_alone(request)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tokens_survive_migrations_under_pressure_and_preemption(data: st.DataObject) -> None:
    """Three to five sequences in a small pool; one after another is moved at odd moments, some migrations fail."""
    jobs = {
        index: make_request(
            [index + 20] * data.draw(st.integers(1, 150)),
            max_tokens=data.draw(st.sampled_from([20, 140, 140])),
            temperature=1.0,
            seed=index,
        )
        for index in range(data.draw(st.integers(3, 5)))
    }
    move = Move(source_blocks=data.draw(st.integers(6, 10)), target_blocks=8)
    for index, request in jobs.items():
        move.source.add(index, request)
    moved: dict[int, list[int]] = {}
    for index, request in jobs.items():
        move.run(data.draw(st.integers(1, 80)))
        move.halted = move.ended = None
        try:
            move.begin(request, index)
        except Refused:
            continue
        move.run(data.draw(st.integers(0, 20)))
        move.source.moves.halt(index)
        move.run(data.draw(st.integers(1, 3)))
        if move.halted is not None and move.ended is None and data.draw(st.booleans()):
            move.land()
            moved[index] = tokens_of(run_to_end(move.target), 9)
        else:
            move.source.moves.resume(index)
            move.target.incoming.failed(9, REPORT)
            run_to_end(move.target)
        assert move.target.num_held_blocks == 0
    move.outputs += run_to_end(move.source)
    for index, request in jobs.items():
        assert tokens_of(move.outputs, index) + moved.get(index, []) == generate_alone(request)
    assert move.source.num_held_blocks == 0
