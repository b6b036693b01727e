"""Named situations end well: every answer is right, each switch goes through its phases once, and roles follow the load or stay as they should."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from cluster.sim.faults import fault_of
from cluster.sim.record import RunRecord
from cluster.sim.role_scenarios import ROLE_SCENARIOS
from cluster.sim.simulation import Simulation
from cluster.sim.traces.generated import generate

DONE = ["intended", "draining", "fencing", "verifying", "done"]
LEFT_OUT = {("roles_leader_death_intended", "draining")}
"""Nothing decodes there any more when the other router leads."""
BY_ORDER = [name for name, scenario in ROLE_SCENARIOS.items() if any(" switch " in fault for fault in scenario.faults)]


@dataclass(frozen=True, slots=True)
class Told:
    """What a run has said of roles: who led, by time; phases by worker; when workers were to be switched."""

    run: RunRecord
    leaders: list[str]
    phases: dict[str, list[str]]
    decisions: list[tuple[float, str]]


def play(name: str) -> Told:
    scenario, lines = ROLE_SCENARIOS[name], []
    settings = scenario.settings
    trace = scenario.reshape(list(generate(scenario.recipe, settings.seed, settings.profile.max_model_len)))
    faults = [fault_of(text.split()) for text in scenario.faults]
    run = Simulation(settings, trace, faults, lambda now, text: lines.append((now, text))).run()
    assert {request.outcome for request in run.requests} == {"ok"}
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
    assert told.phases == {"decode-0": [phase for phase in DONE if (name, phase) not in LEFT_OUT]}
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
