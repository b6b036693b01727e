"""The controller answers a burst within seconds, leaves a lull alone, keeps its floors and pins, and cannot flap."""

from __future__ import annotations

import random

import pytest
from roles_story import TARGETS, RolesStory, demand, fleet, observation, seen

from cluster.roles.config import RolesConfig
from cluster.roles.forecasting import average, foretell
from cluster.roles.outlook import RoleTargets, goodput
from cluster.roles.planner import RoleController, Tick
from cluster.roles.values import Decision, RoleSplit, split_of
from router.fleet.seen import WorkerSeen
from router.requests.demand import DemandReport
from workers.status import Role

AUTO = RolesConfig(mode="auto")
PROMPTS = demand(20, prompt=12000, output=100, waiting_tokens=400_000)
ANSWERS = demand(80, prompt=800, output=1500)
QUIET = demand(0.0)


def run(
    controller: RoleController, workers: list[WorkerSeen], load: DemandReport, seconds: float, at_s: float = 0.0
) -> tuple[list[Decision], list[WorkerSeen]]:
    """Has it look once a second; moves take effect at once."""
    decisions: list[Decision] = []
    held = {worker.worker_id: worker for worker in workers}
    for second in range(int(seconds)):
        now = at_s + second
        for decision in controller.handle(observation(now, held.values(), load), now):
            if decision.effect is None:
                decisions.append(decision)
                for move in decision.moves:
                    worker = held[move.worker_id]
                    assert worker.role is move.source
                    held[move.worker_id] = seen(move.worker_id, move.target, generation=worker.generation + 1)
    return decisions, list(held.values())


def test_a_burst_of_prompts_is_answered_within_seconds_and_by_several_workers_at_once() -> None:
    decisions, workers = run(RoleController(AUTO, TARGETS), fleet(2, 14), PROMPTS, 4)
    assert decisions and len(decisions[0].moves) > 1
    assert split_of(worker.role for worker in workers).prefill > 2
    first = decisions[0]
    assert first.gain > 0 and first.alternatives and first.forecast.backlog_tokens == 400_000
    _, workers = run(RoleController(AUTO, TARGETS), fleet(2, 14), PROMPTS, 60)
    assert split_of(worker.role for worker in workers).prefill >= 8


@pytest.mark.parametrize("prefill", [4, 8])
def test_more_prompts_than_can_be_computed_draw_nobody_away_from_them(prefill: int) -> None:
    """Also where decode workers may compute prompts of any length themselves: they have little time for it, and most of what waits is late."""
    overload = demand(90, prompt=12000, output=100, waiting_tokens=2e7)
    _, workers = run(RoleController(AUTO, TARGETS, local_tokens=16384), fleet(prefill, 16 - prefill), overload, 60)
    assert split_of(worker.role for worker in workers).prefill >= 10


def test_a_short_answer_that_meets_a_long_prompt_is_late_so_mixed_workers_are_worth_less_than_two_kinds() -> None:
    slow = tuple(seen(w.worker_id, w.role, seconds=(0.004, 3e-4, 3e-9, 1e-4, 1e-9)) for w in fleet(2, 3))
    targets = RoleTargets(1.0, 0.012)
    values = {}
    for output in (40, 1200):
        look = observation(0.0, slow, demand(7.0 if output == 40 else 0.6, 4000, output))
        costs = average(look, 0)
        assert costs is not None
        values[output] = goodput([RoleSplit(4, 1, 0), RoleSplit(0, 0, 5)], foretell(look, targets), costs, targets)
    assert values[40][0] > 1.5 * values[40][1]
    assert values[1200][1] > 0.9 * values[1200][0], "a long one makes good for it"


def test_long_answers_draw_workers_to_decode() -> None:
    _, workers = run(RoleController(AUTO, TARGETS), fleet(12, 4), ANSWERS, 90)
    assert split_of(worker.role for worker in workers).prefill <= 6


@pytest.mark.parametrize("load", [QUIET, demand(0.05), demand(1.0, prompt=300, output=50)])
def test_nothing_drifts_in_a_lull(load: DemandReport) -> None:
    controller = RoleController(AUTO, TARGETS)
    for split in ((8, 8), (1, 15), (15, 1)):
        decisions, _ = run(controller, fleet(*split), load, 120)
        assert not decisions


def test_with_one_worker_on_each_side_mixed_is_the_valve() -> None:
    for load in (demand(1.2, prompt=30_000, output=20), demand(12, prompt=100, output=2000)):
        _, workers = run(RoleController(AUTO, TARGETS), fleet(1, 1), load, 60)
        roles = [worker.role for worker in workers]
        assert any(role.can_prefill for role in roles) and any(role.can_decode for role in roles)
        assert Role.MIXED in roles, load


def test_pinned_resting_and_lost_workers_stay_as_they_are() -> None:
    workers = fleet(2, 6)
    controller = RoleController(AUTO, TARGETS)
    kept = {"decode-0", "decode-1", "decode-2"}
    for now in range(30):
        look = observation(
            float(now),
            [seen("decode-2", is_up=False) if w.worker_id == "decode-2" else w for w in workers],
            PROMPTS,
            pinned=frozenset({"decode-0"}),
            resting=frozenset({"decode-1"}),
        )
        for decision in controller.handle(look, float(now)):
            assert not kept & {move.worker_id for move in decision.moves}
    all_pinned = frozenset(worker.worker_id for worker in workers)
    controller = RoleController(AUTO, TARGETS)
    for now in range(30):
        assert not controller.handle(observation(float(now), workers, PROMPTS, pinned=all_pinned), float(now))


def test_what_was_observed_long_ago_and_what_was_never_measured_decide_nothing() -> None:
    controller = RoleController(AUTO, TARGETS)
    for now in range(20, 60):
        assert not controller.handle(observation(1.0, fleet(2, 14), PROMPTS), float(now))
        assert not controller.handle(Tick(), float(now) + 0.5)
    unknown = [seen(worker.worker_id, is_known=False) for worker in fleet(2, 14)]
    assert not run(RoleController(AUTO, TARGETS), unknown, PROMPTS, 30)[0]


def test_the_better_split_is_valued_higher_and_nothing_beyond_what_is_asked() -> None:
    look = observation(0.0, fleet(4, 12), PROMPTS)
    forecast, costs = foretell(look, TARGETS), average(look, 0)
    assert costs is not None
    few, many, all_of_them = goodput(
        [RoleSplit(2, 14, 0), RoleSplit(10, 6, 0), RoleSplit(16, 0, 0)], forecast, costs, TARGETS
    )
    assert few < many <= forecast.asked_per_s and all_of_them == 0


def test_the_desired_number_of_workers_follows_the_load() -> None:
    desired = []
    for rate in (1, 20, 80):
        controller = RoleController(AUTO, TARGETS)
        run(controller, fleet(8, 8), demand(rate, prompt=4000, output=300), 12)
        desired.append(controller.desired_workers)
    assert 0 < desired[0] < desired[1] < desired[2]


def test_flapping_is_bounded_whatever_the_load_does() -> None:
    """Loads drawn at random, with noise, shifts, bursts and lulls: the budget holds in every window, floors hold at every moment, no worker
    switches again before its rest, and a steady load leads to a standstill."""
    for seed in range(12):
        rng = random.Random(seed)
        size = rng.choice((2, 3, 4, 8, 16, 64))
        prefill = rng.randrange(1, size)
        config = RolesConfig(mode="auto", switches_per_hour=rng.choice((2.0, 60.0, 300.0)))
        controller = RoleController(config, TARGETS)
        workers = {worker.worker_id: worker for worker in fleet(prefill, size - prefill)}
        switched: list[tuple[float, str]] = []
        load = QUIET
        for now in range(300):
            if rng.random() < 0.1:
                kind = rng.choice((QUIET, demand(size, 6000, 100), demand(size, 500, 900), demand(size * 2, 3000, 300)))
                load = kind
            noise = rng.uniform(0.6, 1.6)
            noisy = demand(
                load.arrivals_per_s[0] * noise,
                (load.prompt_tokens or (1.0,))[0],
                load.output_tokens,
                rng.choice((0.0, 5e4)),
            )
            for decision in controller.handle(observation(float(now), workers.values(), noisy), float(now)):
                for move in decision.moves if decision.effect is None else ():
                    switched.append((float(now), move.worker_id))
                    workers[move.worker_id] = seen(move.worker_id, move.target)
                roles = [worker.role for worker in workers.values()]
                assert any(role.can_prefill for role in roles) and any(role.can_decode for role in roles)
        per_s = size * config.switches_per_hour / 3600
        for at, (begin_s, worker_id) in enumerate(switched):
            window = [time_s for time_s, _ in switched[at:]]
            for count, end_s in enumerate(window, 1):
                assert count <= 2 * size + (end_s - begin_s) * per_s + 1e-6, seed
            later = [time_s for time_s, other in switched[at + 1 :] if other == worker_id]
            assert not later or later[0] >= begin_s + config.worker_rest_s, seed


def test_the_budget_bounds_switches_under_a_load_that_goes_to_and_fro() -> None:
    """Nothing else does here: rests and the time before a reversal are shorter than each turn of the load."""
    config = RolesConfig(mode="auto", switches_per_hour=1.0, worker_rest_s=5.0, cooldown_s=1.0, reversal_s=1.0)
    controller, workers, count = RoleController(config, TARGETS), fleet(4, 4), 0
    for turn in range(20):
        decisions, workers = run(controller, workers, PROMPTS if turn % 2 else ANSWERS, 15, at_s=15.0 * turn)
        count += sum(len(decision.moves) for decision in decisions)
    assert 8 < count <= 2 * 8 + 8 * 300 / 3600


def test_a_steady_load_leads_to_a_standstill() -> None:
    for load in (PROMPTS, ANSWERS, demand(30, 3000, 300)):
        for prefill in (1, 12):
            controller = RoleController(RolesConfig(mode="auto", switches_per_hour=3600.0), TARGETS)
            _, workers = run(controller, fleet(prefill, 16 - prefill), load, 100)
            decisions, _ = run(controller, workers, load, 100, at_s=100)
            assert not decisions, load


def test_advice_is_kept_and_said_but_changes_nothing() -> None:
    story = RolesStory(fleet(2, 14), config=RolesConfig(mode="advise"), load=PROMPTS)
    story.run(20)
    assert any("would switch" in text for text in story.said) and not story.steps
    decisions = story.cores["router-0"].mirror.decisions()
    assert decisions and decisions[-1]["mode"] == "advise" and decisions[-1]["moves"]
    assert all(worker.generation == 1 for worker in story.workers.values())


def test_the_default_acts_with_three_workers_and_not_with_two() -> None:
    for size, acts in ((2, False), (3, True)):
        story = RolesStory(fleet(1, size - 1), config=RolesConfig(), load=demand(6, 12000, 50, 3e5))
        story.run(30)
        assert bool(story.steps) is acts


def test_the_effect_of_a_decision_is_measured_later() -> None:
    story = RolesStory(fleet(2, 14), config=AUTO, load=PROMPTS)
    story.run(20)
    story.load = demand(20, 4000, 100)
    story.run(60)
    kept = story.cores["router-0"].mirror.decisions()
    assert kept and any(decision["effect"] for decision in kept)
