"""The simulator runs the product: requests get their own tokens through real cores, whatever happens, and the same seed brings the same run."""

from __future__ import annotations

import random

import pytest

from cluster.sim import soak
from cluster.sim.faults import random_faults
from cluster.sim.load import TraceRequest
from cluster.sim.profiles.profile import Profile
from cluster.sim.record import RunRecord
from cluster.sim.settings import Settings
from cluster.sim.simulation import Notice, Simulation
from cluster.sim.soak import try_seed
from cluster.sim.traces.generated import Recipe, generate
from workers.errors import InvariantViolated
from workers.kv_cache.block_pool import BlockPool
from workers.runner import BLOCK_SIZE
from workers.scheduler.sequence import State

SMALL = Recipe(requests=60, rate=6.0, prompt=1200, output=60, pause=2.0)


def small_trace(seed: int, recipe: Recipe = SMALL) -> list[TraceRequest]:
    return list(generate(recipe, seed, Profile().max_model_len))


def outcomes(run: RunRecord) -> list[tuple[object, ...]]:
    records = sorted(run.requests, key=lambda request: int(request.name[1:]))
    return [
        (r.name, r.outcome, r.output_tokens, r.first_token_s, r.finished_s, r.prefill_worker, r.decode_worker)
        for r in records
    ]


def test_every_request_gets_its_own_tokens_and_leaves_nothing_behind() -> None:
    settings = Settings(num_prefill=2, num_decode=2, num_mixed=1, check_interval=20, num_parts=4)
    trace = small_trace(1)
    run = Simulation(settings, trace).run()
    asked = {f"r{number}": request for number, request in enumerate(trace, 1)}
    assert len(run.requests) == len(trace)
    for request in run.requests:  # tokens are compared as they come; a wrong one raises
        assert (request.outcome, request.output_tokens) == ("ok", asked[request.name].output_tokens)
        assert request.first_token_s is not None and request.first_token_s > request.arrival_s
    assert run.counters["handoffs_landed"] > 10
    assert run.counters["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("split", "policy"),
    [({"num_prefill": 1, "num_decode": 2}, "prefix_affinity"), ({"num_mixed": 2}, "least_loaded")],
)
def test_many_steps_at_once_change_no_outcome(split: dict[str, int], policy: str) -> None:
    """Under policies that do not learn from how long steps take; those that do hear of fewer steps."""
    trace = small_trace(2, Recipe(requests=80, rate=10.0, prompt=1500, output=150, pause=1.0, hangups=0.1))
    one_by_one = Simulation(Settings(**split, max_leap_s=0.0, router={"policy": policy}), trace).run()
    together = Simulation(Settings(**split, max_leap_s=1.0, router={"policy": policy}), trace).run()
    assert outcomes(together) == outcomes(one_by_one)
    assert together.num_steps == one_by_one.num_steps
    assert together.num_events < one_by_one.num_events / 2


def test_forecasts_learn_the_same_from_many_steps_at_once() -> None:
    """Where there is nothing to choose, the same steps are learnt from, and nothing differs; else choices differ as between two seeds."""
    trace = small_trace(4, Recipe(requests=60, rate=5.0, prompt=1500, output=200, pause=1.0))
    learnt = []
    for leap_s in (0.0, 1.0):
        simulation = Simulation(Settings(num_prefill=1, num_decode=1, max_leap_s=leap_s), trace)
        run = simulation.run()
        forecasts = simulation.routers["router-0"].core.forecasts
        learnt.append(
            (outcomes(run), forecasts.steps.forecasts(), forecasts.handoffs.fixed_s, forecasts.ttft.quantiles())
        )
    assert learnt[0] == learnt[1]
    assert learnt[0][1][0].num_samples > 100


def test_many_steps_at_once_change_little_where_policies_learn() -> None:
    trace = small_trace(6, Recipe(requests=200, rate=14.0, prompt=1500, output=150, pause=1.0))
    one_by_one, together = (
        Simulation(Settings(num_prefill=2, num_decode=3, max_leap_s=leap_s), trace).run() for leap_s in (0.0, 1.0)
    )
    for name in ("ttft_s", "tpot_s"):
        single, many = (
            sorted(value for r in run.requests if (value := getattr(r, name)) is not None)
            for run in (one_by_one, together)
        )
        for part in (0.5, 0.9):
            assert many[int(part * len(many))] == pytest.approx(single[int(part * len(single))], rel=0.05)


def test_a_long_prompt_keeps_answers_beside_it_waiting_no_longer_than_the_workers_setting_allows() -> None:
    trace = [TraceRequest(0.0, (1,), 64, 64, 400), TraceRequest(0.5, (2,), 8192, 8192, 2)]
    gaps_s, ttfts_s = [], []
    for pause_s in (0.02, 10.0):
        run = Simulation(Settings(num_mixed=1, worker={"max_prefill_pause_s": pause_s}), trace).run()
        answer, prompt = run.requests if run.requests[0].name == "r1" else reversed(run.requests)
        gaps_s.append(answer.max_gap_s)
        ttfts_s.append(prompt.ttft_s)
    whole_s = Profile().step_s(8192, 8192 * 8193 // 2, 0, 0)
    assert gaps_s[0] < 0.04 < whole_s < gaps_s[1]
    assert ttfts_s[0] is not None and ttfts_s[1] is not None and ttfts_s[0] > ttfts_s[1]


def test_a_small_pool_preempts_and_changes_no_token() -> None:
    profile = Profile(num_blocks=40, max_num_seqs=16)
    recipe = Recipe(requests=60, rate=20.0, prompt=300, output=250, turns=1.0, shared=0)
    run = Simulation(Settings(profile=profile, num_mixed=2, check_interval=20), small_trace(3, recipe)).run()
    assert {request.outcome for request in run.requests} == {"ok"}
    assert run.counters["preemptions"] > 0


def test_the_same_seed_brings_the_same_run() -> None:
    settings = Settings(num_prefill=1, num_decode=2, seed=5)
    names = [name for name, _ in settings.workers]

    def once() -> list[tuple[object, ...]]:
        faults = random_faults(random.Random(5), names, settings.routers, 10.0, 4)
        return outcomes(Simulation(settings, small_trace(5), faults).run())

    assert once() == once()


@pytest.mark.parametrize(("role", "state"), [("prefill", State.HELD), ("decode", State.DECODING)])
def test_kv_that_is_not_a_sequence_s_own_changes_its_tokens(role: str, state: State) -> None:
    """A block of another prompt, delivered by a handoff or in the pool of a sequence that decodes, is found out by the tokens that follow."""
    settings = Settings(Profile(transfer_bytes_per_s=1e9), num_prefill=1, num_decode=1)
    simulation = Simulation(settings, small_trace(1))
    worker = simulation.workers
    spoilt: list[int] = []

    def spoil() -> None:
        loop = worker[f"{role}-0"].loop
        for sequence in filter(None, map(loop.engine.sequence, range(1, 200))):
            if sequence.state is state and sequence.num_prompt > 4 * BLOCK_SIZE:
                (content,) = worker[f"{role}-0"].memory.content.layers
                blocks = sequence.table.blocks
                content[blocks[1]], content[blocks[2]] = content[blocks[2]], content[blocks[1]]
                loop.catch_up()
                spoilt.append(sequence.sequence_id)
                return
        simulation.timeline.after(0.001, spoil)

    simulation.timeline.at(1.5, spoil)
    with pytest.raises(InvariantViolated, match="other tokens than those of the request"):
        simulation.run()
    assert spoilt


def test_a_pool_that_has_lost_count_of_a_block_is_found_out() -> None:
    pool = BlockPool(4, lambda blocks: None)
    held = pool.allocate(2)
    pool.hold(held[:1])
    pool.check([*held, held[0]])
    for wrong in ([], held, [*held, *held], [*held, held[0], 3]):
        with pytest.raises(InvariantViolated):
            pool.check(wrong)


def test_random_faults_break_no_promise() -> None:
    """A slice of `make soak`."""
    failures = [why for seed in range(1, 13) if (why := try_seed(seed))]
    assert not failures, "\n\n".join(failures)


def test_a_seed_that_fails_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Settings, trace: object, faults: object, notice: Notice) -> None:
        notice(1.0, "fault: kill decode-0")
        raise InvariantViolated("a block is lost")

    monkeypatch.setattr(soak, "Simulation", broken)
    why = try_seed(12)
    assert "python -m cluster.sim.soak --seed 12" in why
    assert "fault: kill decode-0" in why and "a block is lost" in why
