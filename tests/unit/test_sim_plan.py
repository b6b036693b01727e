"""Plans: the least number of workers and their split, found by asking an oracle, and targets that nobody could keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.sim.planning.plan import Candidate, CapacityPlan, NoPlan, make_plan
from cluster.sim.planning.question import Slo, busiest, floor_ttft_s, least_workers, read_slo, require_reachable
from cluster.sim.planning.search import Evaluate, Outcome, Search, Split, splits
from cluster.sim.planning.text import plan_text, write_plan_plot
from cluster.sim.profiles.profile import Profile
from workers.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class Ask:
    at_s: float
    prompt_tokens: int = 1000
    output_tokens: int = 100


class Oracle:
    """A cluster that needs so much prefill and decode; what is missing is missing from the good requests."""

    def __init__(self, prefill: float, decode: float) -> None:
        self.prefill, self.decode = prefill, decode
        self.asked: list[Split] = []

    def evaluate(self, wanted: Sequence[Split]) -> list[Outcome]:
        self.asked += wanted
        return [self.outcome(split) for split in wanted]

    def outcome(self, split: Split) -> Outcome:
        if split.mixed:
            good = min(1.0, split.mixed / (1.5 * (self.prefill + self.decode)))
        else:
            good = min(1.0, split.prefill / self.prefill, split.decode / self.decode)
        return Outcome(split, good, good * 10, 2 - good, 0.05, 0.5)


@pytest.mark.parametrize(
    ("prefill", "decode", "start"), [(2.0, 5.0, 1), (1.0, 1.0, 1), (14.2, 3.1, 40), (30.0, 60.0, 8)]
)
def test_the_search_finds_the_least_workers_and_their_split(prefill: float, decode: float, start: int) -> None:
    oracle = Oracle(prefill, decode)
    search = Search(oracle.evaluate, 0.95, 256)
    found = search.least(start)
    assert found is not None
    exact = next(
        count
        for count in range(2, 256)
        if max(oracle.outcome(Split(p, count - p)).good_share for p in range(1, count)) >= 0.95
    )
    # With many workers not every split is tried: one worker in twenty may be too many, never too few.
    assert exact <= found.split.num_workers <= exact + exact // 20 + 1
    assert found.good_share >= 0.95
    assert len(oracle.asked) == len(set(oracle.asked)) < 150
    assert [o.split.num_workers for o in search.curve()] == sorted({s.num_workers for s in search.known})


def test_a_number_of_workers_tries_few_splits_and_all_of_them_when_they_are_few() -> None:
    assert splits(1) == [Split(mixed=1)]
    assert splits(4) == [Split(mixed=4), Split(1, 3), Split(2, 2), Split(3, 1)]
    many = splits(200)
    assert len(many) <= 10 and many[1] == Split(1, 199) and many[-1] == Split(199, 1)
    assert all(split.num_workers == 200 for split in many)


def test_a_lost_worker_is_one_of_a_role_that_can_be_missed() -> None:
    search = Search(Oracle(2, 5).evaluate, 0.95, 64)
    assert [(role, outcome.split) for role, outcome in search.lost(Split(2, 5))] == [
        ("prefill", Split(1, 5)),
        ("decode", Split(2, 4)),
    ]
    assert [role for role, _ in search.lost(Split(1, 3))] == ["decode"]
    assert search.lost(Split(mixed=1)) == []


def plan_of(share: float = 0.95, max_workers: int = 64, slo: str = "ttft=5,tpot=0.1") -> CapacityPlan:
    trace = [Ask(float(second)) for second in range(100)]
    big = Candidate(replace(Profile(), name="big", num_blocks=65536), 8)
    small = Candidate(replace(Profile(), name="small"), 1)

    def evaluate(profile: Profile) -> Evaluate:
        return (Oracle(0.5, 0.9) if profile.name == "big" else Oracle(2, 5)).evaluate

    return make_plan([big, small], trace, read_slo(slo), share, max_workers, evaluate, ["the moon is full"])


def test_the_plan_says_what_is_cheapest_and_why(tmp_path: Path) -> None:
    plan = plan_of()
    assert [(each.candidate.profile.name, each.num_accelerators) for each in plan.found] == [("small", 7), ("big", 16)]
    text = plan_text(plan)
    assert "small: 7 workers, starting as 2 prefill + 5 decode" in text
    assert "with one prefill worker lost: 50.0% good, not enough" in text
    assert "with one decode worker lost: 80.0% good, not enough" in text
    assert "big: 2 workers of 8 ranks (16 in all)" in text and "the moon is full" in text
    assert "nothing is served" not in text and "without its only mixed worker" in plan_text(plan_of(share=0.01))
    document = json.loads(json.dumps(plan.as_json()))
    assert document["layouts"][0]["split"] == {"prefill": 2, "decode": 5, "mixed": 0}
    assert len(document["layouts"][0]["over_splits"]) == 7
    write_plan_plot(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_targets_that_no_worker_can_meet_are_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match=r"--slo ttft=0\.001 can be met by no worker of big for 95%"):
        plan_of(slo="ttft=0.001")
    with pytest.raises(InvalidConfig, match=r"--slo tpot=0\.001 can be met by no worker"):
        plan_of(slo="tpot=0.001")
    with pytest.raises(NoPlan, match=r"up to 1 workers keep the targets for 47\.6%"):
        plan_of(max_workers=1)
    profile = replace(Profile(), max_model_len=1024)
    with pytest.raises(InvalidConfig, match="100 of 100 requests of the trace are longer than the 1024 tokens"):
        require_reachable(profile, [Ask(0.0)] * 100, Slo(1.0), 0.95)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=soon", "ttft=-1", "ttft=1,ttft=2", "e2e=3", "tpot=nan"])
def test_targets_are_read_or_refused(text: str) -> None:
    assert read_slo("ttft=2, tpot=0.05") == Slo(2.0, 0.05) and str(read_slo("tpot=0.05")) == "TPOT 50 ms"
    with pytest.raises(InvalidConfig, match="--slo"):
        read_slo(text)


def test_the_busiest_part_of_a_trace_is_used() -> None:
    trace = [Ask(float(index) if index < 100 else 100 + index / 100) for index in range(200)]
    assert busiest(trace, 500) == (0, 200)
    first, last = busiest(trace, 64)
    assert last - first == 64 and first >= 100


def test_a_search_begins_below_what_is_needed() -> None:
    trace = [Ask(index / 50, 4000, 200) for index in range(1000)]
    profile = Profile()
    assert 1 <= least_workers(profile, trace) < 50
    assert floor_ttft_s(profile, 20_000) > 3 * profile.step_s(8192, 0, 0, 0) * 0.8
