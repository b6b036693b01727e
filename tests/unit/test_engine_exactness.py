"""The real model in the real engine: what a request gets, bit for bit, is what it gets when it is alone.

Whatever arrives when, however prompts are cut, whoever is preempted, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from builders import make_engine, make_request, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.model_configs import SHIPPED, load, moe_with_shared_experts, random_tokens
from workers.model.cpu.runner import TorchRunner
from workers.request import Output
from workers.scheduler.sequence import Kind
from workers.token_logprobs import TokenLogprob

NUM_BLOCKS = 12
MAX_LEN = 64 * NUM_BLOCKS
WAITING = 99
"""Id of a sequence whose prompt another worker never brings: it takes blocks and does nothing."""
SHARED = random_tokens(128, seed=100, vocab_size=400)
REQUESTS = (
    make_request(random_tokens(1, seed=1), 24, logprobs=0),
    make_request(SHARED + random_tokens(30, seed=2), 30, logprobs=2),
    make_request(SHARED + random_tokens(60, seed=3), 12, temperature=1.0, seed=7, logprobs=1),
    make_request(SHARED, 20, temperature=0.7, seed=8, top_p=0.9, logprobs=1),
    make_request(random_tokens(63, seed=4), 40, temperature=1.2, seed=9, choice_index=3, top_k=20, logprobs=0),
    make_request(SHARED[:64] + random_tokens(90, seed=5), 6, logprobs=1, prompt_logprobs=2),
    make_request(random_tokens(100, seed=6), 30, repetition_penalty=1.3, presence_penalty=0.4, logprobs=3),
    make_request(random_tokens(40, seed=7), 16, temperature=0.9, seed=1, min_p=0.05, min_tokens=16, logprobs=0),
)

Given = tuple[list[int], list[TokenLogprob], object, object]


@dataclass
class Case:
    """A model on one kind of kernels, and what each request gets alone, with one thread and without a prefix cache."""

    folder: Path
    native: bool
    runners: dict[int, TorchRunner] = field(default_factory=dict)
    alone: list[Given] = field(default_factory=list)

    def runner(self, num_threads: int) -> TorchRunner:
        if num_threads not in self.runners:
            self.runners[num_threads] = load(
                self.folder, num_blocks=NUM_BLOCKS, max_model_len=MAX_LEN, native=self.native, num_threads=num_threads
            )
        torch.set_num_threads(num_threads)  # a runner sets it once for its thread; here runners take turns on one
        return self.runners[num_threads]


def given_to(outputs: list[tuple[int, Output]], sequence_id: int, num_delivered: int = 0) -> Given:
    """Tokens, their logprobs, prompt logprobs and the end."""
    said = [output for owner, output in outputs if owner == sequence_id]
    mine = [output for output in said if output.token_ids or output.finish_reason]
    assert [o.position for o in mine] == list(range(num_delivered, num_delivered + len(mine)))
    return (
        [token for o in mine for token in o.token_ids],
        [entry for o in mine for entry in o.logprobs],
        [entry for o in said for part in o.prompt_logprobs for entry in part],
        mine[-1].finish_reason,
    )


def moe(folder: Path) -> Path:
    return moe_with_shared_experts(folder, num_hidden_layers=3).folder


@pytest.fixture(scope="module", params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=[lambda folder: SHIPPED, moe], ids=["shipped", "moe"])
def case(request: pytest.FixtureRequest, native: bool, tmp_path_factory: pytest.TempPathFactory) -> Case:
    make: Callable[[Path], Path] = request.param
    made = Case(make(tmp_path_factory.mktemp("checkpoint")), native)
    for wanted in REQUESTS:
        engine = make_engine(made.runner(1), max_model_len=MAX_LEN, max_batch_tokens=512, prefix_cache=False)
        engine.add(0, wanted)
        made.alone.append(given_to(run_to_end(engine), 0))
    return made


Jobs = list[tuple[int, int, int]]
"""(step of arrival, which request, tokens of it that were delivered before)."""


def run_together(
    case: Case, num_threads: int, jobs: Jobs, max_num_seqs: int, budget: int, taken_blocks: int, prefix_cache: bool
) -> dict[str, float]:
    """Runs the jobs in one engine and compares what each gets; the engine's counters."""
    engine = make_engine(
        case.runner(num_threads),
        max_model_len=MAX_LEN,
        max_num_seqs=max_num_seqs + 1,
        max_batch_tokens=budget,
        prefix_cache=prefix_cache,
    )
    if taken_blocks:
        engine.add(WAITING, make_request([5] * (64 * taken_blocks), 1), Kind.TARGET)
        assert engine.step().transfers
    outputs: list[tuple[int, Output]] = []
    for step in range(5000):
        for index, (arrival, which, num_delivered) in enumerate(jobs):
            if arrival == step:
                delivered = tuple(case.alone[which][0][:num_delivered])
                engine.add(index, replace(REQUESTS[which], replay_token_ids=delivered))
        outputs += engine.step().outputs
        load = engine.load()
        if step > 25 and not load.num_running and not load.num_waiting:
            break
    for index, (_, which, num_delivered) in enumerate(jobs):
        tokens, logprobs, prompt_logprobs, end = case.alone[which]
        # Whoever has a token has been told of the whole prompt before.
        expected = (tokens[num_delivered:], logprobs[num_delivered:], [] if num_delivered else prompt_logprobs, end)
        assert given_to(outputs, index, num_delivered) == expected
    return dict(engine.counters())


def test_preempted_and_prefix_cached_requests_get_what_they_get_alone(case: Case) -> None:
    run_preempted(case, 1)


# PyTorch's two threads wait for one another at every operator: minutes on a busy machine.
@pytest.mark.parametrize("native", [True, pytest.param(False, marks=pytest.mark.slow)], indirect=True)
def test_preempted_and_prefix_cached_requests_get_it_from_two_threads_too(case: Case) -> None:
    run_preempted(case, 2)


def run_preempted(case: Case, num_threads: int) -> None:
    jobs = [(step, which, 0) for step, which in enumerate((1, 4, 2, 6, 3, 5))]
    counters = run_together(case, num_threads, jobs, 6, 65, taken_blocks=6, prefix_cache=True)
    assert counters["preemptions"] and counters["replayed_tokens"] and counters["cached_tokens"]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_any_arrivals_chunks_limits_and_pressure_give_what_a_request_gets_alone(case: Case, num_threads: int) -> None:
    is_slow = num_threads == 2 and not case.native  # as above: two short requests
    num_examples = 1 if is_slow else {(True, 1): 25, (True, 2): 8, (False, 1): 4}[case.native, num_threads]

    @settings(max_examples=num_examples, deadline=None)
    @given(
        jobs=st.lists(
            st.tuples(
                st.integers(0, 25),
                st.sampled_from((5, 7) if is_slow else range(len(REQUESTS))),
                st.sampled_from([0, 0, 0, 1, 5]),
            ),
            min_size=2,
            max_size=8,
        ),
        max_num_seqs=st.integers(1, 8),
        budget=st.sampled_from([200, 8, 17, 64, 65, 512]),
        taken_blocks=st.integers(0, NUM_BLOCKS - 5),
        prefix_cache=st.booleans(),
    )
    def check(jobs: Jobs, max_num_seqs: int, budget: int, taken_blocks: int, prefix_cache: bool) -> None:
        run_together(case, num_threads, jobs, max_num_seqs, max(budget, max_num_seqs), taken_blocks, prefix_cache)

    check()
