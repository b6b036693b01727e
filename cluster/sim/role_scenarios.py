"""Named situations that the role controllers of a cluster must master; tests/unit/test_role_scenarios.py says how each has to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.sim.load import TraceRequest
from cluster.sim.product import RolesConfig
from cluster.sim.scenarios import Scenario
from cluster.sim.settings import Settings
from cluster.sim.traces.generated import Recipe

_AUTO = RolesConfig(mode="auto")
_BY_ORDER = RolesConfig(mode="off", drain_timeout_s=4.0, step_timeout_s=3.0)
_SIX = Settings(num_prefill=2, num_decode=4, seed=1, check_interval=2000, ttft_s=1.0, tpot_s=0.02, roles=_AUTO)
_STEADY = Recipe(requests=120, rate=8.0, prompt=1500, output=150, pause=2.0)
_TWO_ROUTERS = replace(_SIX, num_routers=2, num_prefill=2, num_decode=3, roles=_BY_ORDER)
_ORDER = "4 switch decode-0 role=prefill"


def _burst(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    """Few requests for ten seconds, then all of the rest within five."""
    calm, rest = trace[:20], trace[20:]
    return [replace(one, at_s=at * 0.5) for at, one in enumerate(calm)] + [
        replace(one, at_s=10.0 + at * 5.0 / len(rest)) for at, one in enumerate(rest)
    ]


def _with_lull(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    half = len(trace) // 2
    return [*trace[:half], *(replace(one, at_s=one.at_s + 90.0) for one in trace[half:])]


ROLE_SCENARIOS = {
    "roles_burst": Scenario(
        "Prompts come in a burst: workers go from decode to prefill within seconds.",
        settings=_SIX,
        recipe=replace(_STEADY, requests=320, prompt=9000, output=40, turns=1.0),
        reshape=_burst,
    ),
    "roles_lull": Scenario(
        "Nothing is asked for a minute and a half: nobody drifts to another role.", settings=_SIX, reshape=_with_lull
    ),
    "roles_worker_death": Scenario(
        "A decode worker dies while its sequences move away for a switch, and comes back.",
        settings=_TWO_ROUTERS,
        faults=(_ORDER, "4.02 kill decode-0 restart=2"),
    ),
    **{
        f"roles_leader_death_{phase}": Scenario(
            f"The leader dies when a switch is {phase}; the other router goes on with it.",
            settings=_TWO_ROUTERS,
            faults=(_ORDER, f"{at_s} kill router-0 restart=20"),
        )
        for phase, at_s in (("intended", 4.0003), ("draining", 4.02), ("fencing", 4.1203), ("verifying", 4.1403))
    },
    "roles_partition": Scenario(
        "The leader is cut off from the store in mid-switch: another one leads when its lease has ended, and goes on.",
        settings=_TWO_ROUTERS,
        faults=(_ORDER, "4.02 cut router-0 from=store for=12"),
    ),
    "roles_never_drained": Scenario(
        "The controller wants a decode worker that cannot be emptied in time: the switch is undone.",
        settings=replace(
            _SIX,
            roles=replace(_AUTO, drain_timeout_s=0.05, worker_rest_s=5.0),
            router={"max_migrations": 1},
        ),
        recipe=replace(_STEADY, requests=240, rate=12.0, prompt=9000, output=200, turns=1.0),
    ),
}
