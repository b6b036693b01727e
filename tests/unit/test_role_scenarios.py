"""Named situations go as written down and end well: every answer is right, each switch goes through its phases once, and roles follow the load or stay as they should."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.sim.record import RunRecord
from cluster.sim.role_scenarios import ROLE_SCENARIOS

GOLDEN = Path(__file__).resolve().parent.parent / "sim" / "golden"
DONE = ["intended", "draining", "fencing", "verifying", "done"]
BY_ORDER = [name for name, scenario in ROLE_SCENARIOS.items() if any(" switch " in fault for fault in scenario.faults)]


@dataclass(frozen=True, slots=True)
class Told:
    """What a run has said of roles: who led, by time; phases by worker; when workers were to be switched."""

    run: RunRecord
    leaders: list[str]
    phases: dict[str, list[str]]
    decisions: list[tuple[float, str]]


def play(name: str) -> Told:
    run, transcript = ROLE_SCENARIOS[name].run()
    assert {request.outcome for request in run.requests} == {"ok"}
    assert transcript == (GOLDEN / f"{name}.txt").read_text(), (
        "if this is meant: python tests/unit/test_sim_scenarios.py"
    )
    lines = [(float(found[1]), found[2]) for found in re.finditer(r"^ *(-?[\d.]+)  (.*)$", transcript, re.MULTILINE)]
    leaders = [found[1] for _, text in lines if (found := re.match(r"roles: (\S+) leads the roles", text))]
    phases: dict[str, list[str]] = {}
    for _, text in lines:
        if found := re.match(r"roles: (\S+) to \S+ is (\w+)", text):
            phases.setdefault(found[1], []).append(found[2])
    decisions = [(now, text) for now, text in lines if text.startswith("roles: switches ")]
    return Told(run, leaders, phases, decisions)


@pytest.mark.parametrize("name", BY_ORDER)
def test_a_switch_that_is_asked_for_is_whole_whoever_dies_or_is_cut_off_in_the_middle_of_it(name: str) -> None:
    told = play(name)
    assert told.phases == {"decode-0": DONE}
    assert told.leaders == (["router-0"] if name == "roles_worker_death" else ["router-0", "router-1"])
    assert [(switch.worker, switch.role) for switch in told.run.switches] == [("decode-0", "prefill")]


def test_a_burst_of_prompts_draws_several_workers_within_seconds() -> None:
    told = play("roles_burst")
    in_time = [text for now, text in told.decisions if 10.0 <= now <= 13.0]
    assert in_time and in_time[0].count("from decode to prefill") >= 2, told.decisions


def test_nobody_drifts_in_a_lull() -> None:
    told = play("roles_lull")
    assert not told.decisions and not told.run.switches


def test_what_cannot_be_emptied_in_time_goes_back_to_its_work() -> None:
    told = play("roles_never_drained")
    undone = [phases for phases in told.phases.values() if "undoing" in phases]
    assert undone and all(phases[-1] in ("done", "rolled_back") for phases in told.phases.values())
    assert undone[0][undone[0].index("undoing") + 1] == "rolled_back"


def test_workers_go_over_when_the_load_shifts_and_back_when_it_shifts_back() -> None:
    told = play("roles_shift_and_back")
    recipe = ROLE_SCENARIOS["roles_shift_and_back"].recipe
    third_s = recipe.requests / recipe.rate / 3
    to_decode = [now for now, text in told.decisions if re.search("from prefill to (?:mixed|decode)", text)]
    to_prefill = [now for now, text in told.decisions if re.search("from (?:decode|mixed) to prefill", text)]
    assert any(now < third_s for now in to_prefill), told.decisions
    assert any(third_s < now < 2 * third_s for now in to_decode), told.decisions
    assert any(2 * third_s < now < 3 * third_s for now in to_prefill), "and back"
    assert all(phases[-1] == "done" for phases in told.phases.values())


def test_with_one_worker_of_each_role_both_kinds_of_work_go_on() -> None:
    told = play("roles_one_of_each")
    roles = {"prefill-0": "prefill", "decode-0": "decode", "mixed-0": "mixed"}
    for switch in told.run.switches:
        roles[switch.worker] = switch.role
        assert {"decode", "mixed"} & set(roles.values()) and {"prefill", "mixed"} & set(roles.values())
    assert all(phases[-1] in ("done", "rolled_back") for phases in told.phases.values())


def test_what_is_seen_late_leaves_no_switch_half_done() -> None:
    told = play("roles_stale_observations")
    assert told.run.switches and len(told.decisions) <= 3, "what is seen late is not answered again and again"
    assert all(phases[-1] in ("done", "rolled_back") for phases in told.phases.values())


def test_a_pinned_worker_stays_where_it_does_not_fit() -> None:
    told = play("roles_misfit_pin")
    assert told.phases["decode-3"] == DONE, "the fourth one may go, and goes"
    assert {switch.worker for switch in told.run.switches} <= {"decode-3", "prefill-0", "prefill-1"}
