"""What a router learns of its workers' speed from the steps that they report: stories over the columns of a table, without a router."""

from __future__ import annotations

import random

import numpy as np
import pytest

from router.fleet.worker_table import WorkerTable
from router.forecast.fit import LinearFit
from router.forecast.handoffs import HandoffTimes
from router.forecast.steps import MAX_KINDS, WORK, StepTimes
from workers.status import Load, ModelInfo, Role, WorkerStatus

TRUE_S = dict(zip(WORK, (4e-3, 6e-5, 5e-9, 2.4e-5, 1.5e-9), strict=True))
"""Seconds of a unit of work of the workers in these stories."""


def status(name: str = "w", fingerprint: str = "f", max_batch_tokens: int = 2048) -> WorkerStatus:
    model = ModelInfo("m", fingerprint, 1000, 1 << 17, 64)
    return WorkerStatus(name, 1, Role.MIXED, model, Load(), max_num_seqs=256, max_batch_tokens=max_batch_tokens)


class Workers:
    """A table of workers that compute steps of random size, at a rate of their own."""

    def __init__(self, count: int, seed: int = 1) -> None:
        self.table, self.times, self.random = WorkerTable(), StepTimes(), random.Random(seed)
        for index in range(count):
            row = self.table.add(f"w-{index}")
            self.times.show_worker(self.table, row, self.times.kind_of(status(f"w-{index}")))

    def step(self, row: int, slowness: float = 1.0, decodes: bool = True, prompts: bool = True) -> None:
        pick = self.random
        num_decodes = pick.randrange(1, 200) if decodes else 0
        num_prompt = pick.choice((0, 512, 2048)) if prompts and decodes else 2048 * prompts
        work = (1, num_decodes, num_decodes * pick.randrange(200, 8000), num_prompt, num_prompt * pick.randrange(9000))
        seconds = sum(unit * count for unit, count in zip(TRUE_S.values(), work, strict=True))
        self.table.steps[row] = (*work, seconds * slowness * pick.uniform(0.95, 1.05))
        self.table.has_step[row] = True

    def run(self, num_ticks: int, slow: dict[int, float] | None = None, **what: bool) -> None:
        for _ in range(num_ticks):
            for row in range(len(self.table)):
                self.step(row, (slow or {}).get(row, 1.0), **what)
            self.times.learn(self.table)


def error(table: WorkerTable, row: int, work: tuple[float, ...], slowness: float = 1.0) -> float:
    """Of the time that is expected for a step, relative to the true one."""
    true_s = sum(unit * count for unit, count in zip(TRUE_S.values(), work, strict=True)) * slowness
    return abs(float(table.seconds[row] @ work) / true_s - 1)


DECODE = (1, 100, 100 * 2000, 0, 0)
PROMPT = (1, 0, 0, 2048, 2048 * 4000)


def test_steps_of_all_kinds_are_foretold_within_some_percent() -> None:
    workers = Workers(4)
    workers.run(60)
    for row in range(4):
        assert error(workers.table, row, DECODE) < 0.08 and error(workers.table, row, PROMPT) < 0.08
        assert workers.table.is_known[row]


def test_a_worker_that_has_computed_no_prompt_is_known_by_those_of_its_kind() -> None:
    workers = Workers(2)
    for _ in range(60):
        workers.step(0, decodes=False)
        workers.step(1, prompts=False)
        workers.times.learn(workers.table)
    assert error(workers.table, 1, PROMPT) < 0.1
    assert error(workers.table, 0, DECODE) < 0.1


def test_what_is_known_of_prompts_outlasts_a_night_of_decoding() -> None:
    workers = Workers(1)
    workers.run(60)
    workers.run(3000, prompts=False)
    assert error(workers.table, 0, PROMPT) < 0.15


def test_a_worker_that_becomes_slow_is_known_to_be_after_some_steps_and_so_is_its_recovery() -> None:
    workers = Workers(6)
    workers.run(60)
    workers.run(6, slow={2: 4.0})
    assert 3.2 < workers.table.speeds[2] < 4.8
    assert error(workers.table, 2, DECODE, 4.0) < 0.25
    assert all(0.85 < workers.table.speeds[row] < 1.15 for row in (0, 1, 3, 4, 5)), "the others are not blamed"
    workers.run(20)
    assert 0.85 < workers.table.speeds[2] < 1.15


def test_a_slow_worker_without_work_comes_to_be_tried_again_and_one_that_computes_does_not() -> None:
    workers = Workers(3)
    workers.run(60)
    workers.run(9, slow={1: 5.0, 2: 5.0})
    workers.table.num_sequences[2] = 1  # in the middle of a long step
    for _ in range(30):
        workers.step(0)
        workers.times.learn(workers.table)
    assert workers.table.speeds[1] < 1.2 and error(workers.table, 1, DECODE) < 0.3
    assert workers.table.speeds[2] > 4


def test_outliers_move_neither_the_fit_nor_the_speed() -> None:
    calm, disturbed = Workers(3), Workers(3)
    for workers in (calm, disturbed):
        workers.run(60)
    for tick in range(12):
        for workers in (calm, disturbed):
            for row in range(3):
                workers.step(row, slowness=500.0 if workers is disturbed and row == 0 and tick % 4 == 0 else 1.0)
            workers.times.learn(workers.table)
    assert np.abs(disturbed.table.speeds / calm.table.speeds - 1).max() < 0.1
    assert abs(float(disturbed.table.seconds[1] @ DECODE) / float(calm.table.seconds[1] @ DECODE) - 1) < 0.05


def test_the_same_step_is_learnt_from_once() -> None:
    workers = Workers(1)
    workers.step(0)
    for _ in range(5):
        workers.times.learn(workers.table)
    assert workers.table.num_steps[0] == 1 and workers.times.num_samples(0) == 1


def test_kinds_are_kept_apart_and_are_bounded() -> None:
    times = StepTimes()
    kinds = [times.kind_of(status(fingerprint=f"f-{index}")) for index in range(100)]
    assert kinds[:MAX_KINDS] == list(range(MAX_KINDS)) and set(kinds[MAX_KINDS:]) == {MAX_KINDS - 1}
    assert len(times.forecasts()) == MAX_KINDS
    assert times.kind_of(status(fingerprint="f-0", max_batch_tokens=512)) != 0


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_no_kind_of_work_ever_takes_less_than_nothing(unit: int) -> None:
    """Samples that would be explained best by a negative time."""
    pick = random.Random(unit)
    fit = LinearFit((1e-3, 1e-3, 1e-3))
    for _ in range(50):
        work = np.array([[1.0, pick.uniform(0, 10), pick.uniform(0, 10)]])
        seconds = 1.0 + 0.3 * work[0, 1] + 0.3 * work[0, 2] - 0.55 * work[0, unit]
        fit.take(work, np.array([max(0.01, seconds)]))
        assert (fit.coefficients >= 0).all()


def test_a_handoff_is_foretold_by_the_blocks_that_it_moves() -> None:
    handoffs, pick = HandoffTimes(), random.Random(3)
    for _ in range(40):
        num_blocks = pick.randrange(4, 400)
        handoffs.note(num_blocks, (0.002 + num_blocks * 5e-5) * pick.uniform(0.9, 1.1))
        handoffs.learn()
    assert abs((handoffs.fixed_s + 200 * handoffs.block_s) / (0.002 + 200 * 5e-5) - 1) < 0.1
