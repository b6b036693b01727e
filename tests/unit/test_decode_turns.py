"""However many long contexts decode beside it, a short sequence gets its token in every step and no step is long; the long ones take turns."""

from __future__ import annotations

from collections import Counter

import pytest
from test_pace import Host, sequence

from workers.runner import Batch
from workers.scheduler.ahead import schedule_ahead
from workers.scheduler.load import work_of
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.sequence import Sequence, State
from workers.scheduler.turns import DecodeTurns

PAUSE_S = 0.04


class Decoding:
    """A host whose steps take `base_s`, and so long for each sequence that decodes and each token before it."""

    def __init__(self, base_s: float, sequence_s: float, token_s: float, max_pause_s: float = PAUSE_S) -> None:
        self.cost = base_s, sequence_s, token_s
        self.turns = DecodeTurns(max_pause_s)
        self.all: list[Sequence] = []
        self.steps: list[float] = []
        self.counts: Counter[int] = Counter()

    def add(self, context: int) -> Sequence:
        new = sequence(len(self.all), 1)
        new.num_computed = context
        self.all.append(new)
        return new

    def step(self, held_up_s: float = 0.0) -> list[Sequence]:
        chosen = self.turns.choose(self.all)
        self.turns.give(chosen)
        base_s, sequence_s, token_s = self.cost
        context = sum(each.num_computed for each in chosen)
        self.steps.append(base_s + sequence_s * len(chosen) + token_s * context + held_up_s)
        self.turns.took(self.steps[-1], len(chosen), context)
        for each in chosen:
            each.num_computed += 1
            self.counts[each.sequence_id] += 1
        return chosen


def test_a_short_sequence_decodes_in_every_step_and_no_step_is_long() -> None:
    """Of the shipped model on two cores, 64 full contexts at once would take 0.2 s."""
    host = Decoding(0.004, 1e-4, 4e-7)
    victim = host.add(20)
    for _ in range(20):
        host.step()
    for _ in range(16):  # prompts are done some at a time
        for _ in range(4):
            host.add(8000)
        assert victim in host.step()
    for _ in range(200):
        assert victim in host.step()
    assert max(host.steps) <= 2 * PAUSE_S
    assert sum(host.steps[-100:]) <= 1.2 * 100 * PAUSE_S, "and no longer than it may on average"
    long = [host.counts[each.sequence_id] for each in host.all[1:]]
    assert min(long) >= 20 and max(long) - min(long) <= 16, "the long ones take turns"


def test_nobody_waits_where_all_of_them_take_no_longer_than_they_may() -> None:
    host = Decoding(0.004, 1e-4, 1e-8)
    for context in (20, 8000, 100_000, 30):
        host.add(context)
    for _ in range(50):
        assert host.step() == host.all


@pytest.mark.parametrize("num_sequences", [2, 64])
def test_a_model_that_is_slow_at_everything_decodes_all_of_them_at_once(num_sequences: int) -> None:
    """One at a time they would take for ever."""
    host = Decoding(1.0, 0.002, 1e-6)
    host.add(20)
    for _ in range(20):
        host.step()
    for _ in range(num_sequences):
        host.add(2000)
    steps = [len(host.step()) for _ in range(400)]
    assert steps.count(num_sequences + 1) >= 396, "but for a few that show what a step takes with little in it"


@pytest.mark.parametrize("num_long", [1, 7, 14])
def test_so_it_does_where_it_never_decodes_one_alone(num_long: int) -> None:
    host = Decoding(0.05, 0.001, 1e-6)
    host.add(20)
    for _ in range(num_long):
        host.add(2000)
    steps = [len(host.step()) for _ in range(400)]
    assert steps.count(num_long + 1) >= 390


@pytest.mark.parametrize("held_up_s", [0.3, 1.0])
@pytest.mark.parametrize("num_long", [1, 3, 15])
def test_a_step_that_something_else_held_up_is_forgotten(num_long: int, held_up_s: float) -> None:
    host = Decoding(0.01, 1e-4, 1e-7)
    host.add(20)
    for _ in range(20):
        host.step()
    for at in range(num_long):
        host.add(3000 + 20 * at)
    host.step(held_up_s)
    for _ in range(1000):
        host.step()
    assert [len(host.step()) for _ in range(100)] == [num_long + 1] * 100


def test_where_none_is_short_all_decode_however_long_that_takes() -> None:
    host = Decoding(0.01, 1e-4, 1e-5)
    for at in range(8):
        host.add(3000 + 500 * at)
    assert [len(host.step()) for _ in range(200)] == [8] * 200


def test_one_that_takes_longer_than_a_step_may_decodes_all_the_same() -> None:
    host = Decoding(0.001, 1e-4, 1e-5)
    for _ in range(3):
        host.add(30_000)
    for _ in range(60):
        assert host.step()
    assert max(host.counts.values()) - min(host.counts.values()) <= 3


class Contexts(Host):
    """A scheduler whose steps take as long as the contexts in it are."""

    def __init__(self) -> None:
        super().__init__(1e-6, 0.0)
        limits = Limits(64, 8192, 1000, 0, max_decode_pause_s=PAUSE_S)
        self.scheduler = Scheduler(self.scheduler.kv, limits)

    def seconds(self, batch: Batch) -> float:
        return super().seconds(batch) + 1e-5 * sum(piece.start for piece in batch.decode)

    def finish(self, batch: Batch) -> None:
        super().finish(batch)
        took = work_of(batch, self.seconds(batch))
        if batch.decode and not batch.prefill:
            self.scheduler.turns.took(took.step_s, took.step_decodes, took.step_context)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_scheduler_has_long_contexts_take_turns_and_so_does_what_is_launched_ahead(is_ahead: bool) -> None:
    host = Contexts()
    victim, long = sequence(0, 20), [sequence(at, 2000 + at) for at in range(1, 9)]
    for each in (victim, *long):
        host.scheduler.add(each)
    while any(each.state is not State.DECODING for each in (victim, *long)):
        host.step()
    running = host.scheduler.schedule().batch
    host.steps.clear()
    for _ in range(60):
        ahead = schedule_ahead(host.scheduler, running) if is_ahead else None
        host.finish(running)
        running = host.scheduler.schedule().batch if ahead is None else ahead.batch
        assert is_ahead is (ahead is not None)
        assert victim.sequence_id in [piece.sequence_id for piece in running.decode]
    assert max(host.steps[20:]) <= 1.5 * PAUSE_S
    drawn = [each.num_drawn for each in long]
    assert min(drawn) >= 6 and max(drawn) - min(drawn) <= 8


def test_what_was_decided_and_not_done_is_nobodys_turn() -> None:
    host = Decoding(0.001, 0.0, 1e-5)
    for context in (20, 3000, 3000, 3000, 3000):
        host.add(context)
    for _ in range(20):
        host.step()
    first = host.turns.choose(host.all)
    assert len(first) < 5 and host.turns.choose(host.all) == first
    host.turns.give(first)
    assert host.turns.choose(host.all) != first
