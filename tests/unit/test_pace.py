"""However dear a prompt is, those that decode beside it wait no longer than they may for each token, and it still gets on."""

from __future__ import annotations

import math

import pytest

from workers.kv_cache.manager import KvCacheManager
from workers.request import Request, SamplingParams
from workers.runner import BLOCK_SIZE, Batch
from workers.scheduler.ahead import schedule_ahead
from workers.scheduler.load import work_of
from workers.scheduler.pace import Pace, Room
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.sequence import Kind, Sequence

PAUSE_S = 0.04
DECODE_S = 0.004


def sequence(number: int, num_prompt: int, max_tokens: int = 100_000, first: int = 5) -> Sequence:
    tokens = tuple(range(first, first + num_prompt))
    request = Request(f"r{number}", tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return Sequence(number, request, Kind.LOCAL, number, max_output_tokens=max_tokens)


class Host:
    """Runs what a scheduler decides, and says how long it takes: attention to all that comes before is most of a long prompt."""

    def __init__(self, per_token_s: float, per_context_s: float, max_pause_s: float = PAUSE_S) -> None:
        self.cost = per_token_s, per_context_s
        self.scheduler = Scheduler(KvCacheManager(4096, BLOCK_SIZE), Limits(256, 512, 1000, 0, max_pause_s))
        self.steps: list[float] = []
        self.factor = 1.0
        """How much slower the host is than at its best."""

    def seconds(self, batch: Batch) -> float:
        work, (per_token_s, per_context_s) = work_of(batch, 0.0), self.cost
        prompts_s = per_token_s * work.step_prompt_tokens + per_context_s * work.step_prompt_context
        return self.factor * (prompts_s + (DECODE_S if batch.decode else 0.0))

    def step(self) -> Batch:
        batch = self.scheduler.schedule().batch
        self.finish(batch)
        return batch

    def finish(self, batch: Batch) -> None:
        by_id = {each.sequence_id: each for each in self.scheduler.active}
        for piece in batch.prefill:
            self.scheduler.computed_prefill(by_id[piece.sequence_id], len(piece.token_ids))
            if piece.sample is not None:
                self.scheduler.drew(by_id[piece.sequence_id], 7)
        for piece in batch.decode:
            self.scheduler.computed_decode(by_id[piece.sequence_id])
            self.scheduler.drew(by_id[piece.sequence_id], 7)
        took = work_of(batch, self.seconds(batch))
        self.scheduler.pace.took(took.step_s, took.step_decodes, took.step_prompt_tokens, took.step_prompt_context)
        self.steps.append(took.step_s)


def beside_a_victim(host: Host) -> Sequence:
    """Somebody decodes, and prompts have been computed before."""
    victim = sequence(1, 100)
    host.scheduler.add(sequence(0, 2000, max_tokens=1))
    host.scheduler.add(victim)
    while victim.num_drawn < 20:
        host.step()
    for each in list(host.scheduler.active):
        if each is not victim:
            host.scheduler.finish(each)
    host.steps.clear()
    return victim


HOSTS = {
    "two cores": (6e-5, 6e-8),
    "attention alone": (1e-9, 2e-7),
    "no attention": (4e-4, 0.0),
    "a gpu": (1e-6, 1e-11),
}


@pytest.mark.parametrize("host_of", HOSTS)
@pytest.mark.parametrize(("num_prompts", "num_tokens"), [(1, 30_000), (40, 1000), (4, 8000)])
def test_every_step_of_a_dear_prompt_gives_the_victim_its_token_in_time(
    host_of: str, num_prompts: int, num_tokens: int
) -> None:
    host = Host(*HOSTS[host_of])
    victim = beside_a_victim(host)
    dear = [sequence(10 + at, num_tokens - at) for at in range(num_prompts)]
    for each in dear:
        host.scheduler.add(each)
    while not all(each.num_drawn for each in dear):
        drawn = victim.num_drawn
        host.step()
        assert victim.num_drawn == drawn + 1, "no step without it"
    a_block_s = max(host.cost[0] * BLOCK_SIZE + host.cost[1] * BLOCK_SIZE * num_tokens, 0.0)
    assert max(host.steps) <= max(1.3 * PAUSE_S, a_block_s) + 2 * DECODE_S


def test_what_is_launched_ahead_is_bounded_alike() -> None:
    host = Host(*HOSTS["two cores"])
    victim = beside_a_victim(host)
    host.scheduler.add(sequence(10, 8000))
    running, most = host.scheduler.schedule().batch, 0
    for _ in range(30):
        ahead = schedule_ahead(host.scheduler, running)
        host.finish(running)
        assert ahead is not None and victim.sequence_id in [piece.sequence_id for piece in ahead.batch.decode]
        running = ahead.batch
        most = max(most, sum(len(piece.token_ids) for piece in running.prefill))
    assert 0 < most <= 512 and max(host.steps) <= 1.3 * PAUSE_S + 2 * DECODE_S


def test_alone_a_prompt_is_computed_in_the_largest_steps() -> None:
    host = Host(*HOSTS["two cores"])
    host.scheduler.add(sequence(0, 5120))
    assert [sum(len(piece.token_ids) for piece in host.step().prefill) for _ in range(10)] == [512] * 10


def test_a_model_that_is_slow_at_everything_computes_prompts_for_as_long_as_it_decodes() -> None:
    """In bites of 50 ms they would take for ever."""
    pace = Pace(PAUSE_S)
    for _ in range(20):
        pace.took(2.0, 1, 0, 0)
        pace.took(7.0, 1, 512, 512 * 256)
    assert pace.allowance_s == pytest.approx(2.0, rel=0.01)
    assert 128 <= pace.tokens(pace.allowance_s, 0) <= 256


def test_a_host_that_becomes_slower_is_followed_and_a_hiccup_is_not() -> None:
    host = Host(*HOSTS["two cores"])
    beside_a_victim(host)
    host.scheduler.add(sequence(10, 20_000))
    for _ in range(10):
        host.step()
    before = host.scheduler.pace.tokens(PAUSE_S, 4096)
    host.factor = 20.0
    host.step()
    host.factor = 1.0
    host.step()
    assert host.scheduler.pace.tokens(PAUSE_S, 4096) >= before / 2
    host.factor = 4.0
    for _ in range(40):
        host.step()
    assert host.steps[-1] <= max(1.3 * PAUSE_S, host.factor * 64 * (6e-5 + 6e-8 * 20_000)) + 8 * DECODE_S


def test_without_a_bound_nothing_is_held_back() -> None:
    pace = Pace(math.inf)
    pace.took(100.0, 1, 512, 512)
    assert pace.tokens(pace.allowance_s, 10**6) > 10**9


def test_prompts_that_find_no_room_in_a_step_wait_outside_and_find_what_the_first_has_computed() -> None:
    """Forty alike, beside one that decodes: the first is computed, and the others take its blocks from the cache."""
    host = Host(*HOSTS["two cores"])
    beside_a_victim(host)
    alike = [sequence(10 + at, 1500, first=7000) for at in range(40)]
    for each in alike:
        host.scheduler.add(each)
    computed = sum(len(piece.token_ids) for _ in range(2) for piece in host.step().prefill)
    assert len(host.scheduler.active) <= 3 and len(host.scheduler.waiting) >= 38
    while not all(each.num_drawn for each in alike):
        computed += sum(len(piece.token_ids) for piece in host.step().prefill)
    assert computed < 2 * 1500 + 40 * 2 * BLOCK_SIZE


def mixed_steps(pace: Pace, decode_s: float, token_s: float, count: int) -> list[int]:
    """How many prompt tokens each of so many steps takes, where decoding and a token of a prompt take so long."""
    taken = []
    for _ in range(count):
        room = Room(512, pace.allowance_s, pace)
        tokens = room.fit(512, 0)
        pace.took(decode_s + tokens * token_s, 1, tokens, tokens**2 // 2)
        taken.append(tokens)
    return taken


@pytest.mark.parametrize("decode_s", [0.06, 0.2])
def test_decoding_that_becomes_dearer_is_not_taken_for_prompts_for_long(decode_s: float) -> None:
    """Prompts come without an end, so no step would only decode by itself."""
    pace = Pace(PAUSE_S)
    for _ in range(10):
        pace.took(0.02, 1, 0, 0)
    taken = mixed_steps(pace, decode_s, 1e-4, 400)
    assert sum(taken[200:]) / 200 > 0.8 * min(512, max(decode_s, PAUSE_S) / 1e-4)


def test_decoding_that_becomes_cheaper_does_not_make_prompts_look_free() -> None:
    pace = Pace(PAUSE_S)
    for _ in range(10):
        pace.took(0.2, 1, 0, 0)
    mixed_steps(pace, 0.2, 5e-3, 20)
    pace.took(0.20001, 1, 64, 64 * 32)
    assert max(mixed_steps(pace, 0.05, 5e-3, 100)[20:]) <= 128


@pytest.mark.parametrize("max_pause_s", [PAUSE_S, math.inf])
def test_steps_that_take_no_longer_than_decoding_did_make_no_prompt_free(max_pause_s: float) -> None:
    """However many come, with none between them that only decodes."""
    pace = Pace(max_pause_s)
    pace.took(0.5, 1, 0, 0)
    for _ in range(5000):
        pace.took(0.01, 1, 256, 256 * 128)
    assert 0.01 / 300 < pace.seconds(256, 0) < 0.011
    assert 200 <= pace.tokens(0.02, 0) < 10**6
