"""Named scenarios go as their transcripts in tests/sim/golden say. `python tests/unit/test_sim_scenarios.py` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.sim.role_scenarios import ROLE_SCENARIOS
from cluster.sim.scenarios import SCENARIOS

GOLDEN = Path(__file__).resolve().parent.parent / "sim" / "golden"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_goes_as_written_down(name: str) -> None:
    run, text = SCENARIOS[name].run()
    assert {request.outcome for request in run.requests} == {"ok"}
    assert text == (GOLDEN / f"{name}.txt").read_text(), "if this is meant: python tests/unit/test_sim_scenarios.py"


def test_no_transcript_is_left_behind() -> None:
    """Those with role controllers are compared by tests/unit/test_role_scenarios.py."""
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(SCENARIOS) | set(ROLE_SCENARIOS)


if __name__ == "__main__":
    for name, scenario in (SCENARIOS | ROLE_SCENARIOS).items():
        (GOLDEN / f"{name}.txt").write_text(scenario.run()[1])
