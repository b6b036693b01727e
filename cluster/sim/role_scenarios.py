"""Named situations that the role controllers of a cluster must master: tests/unit/test_role_scenarios.py says how each has to end, tests/sim/golden how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.sim.load import TraceRequest
from cluster.sim.product import RolesConfig
from cluster.sim.profiles.profile import LinearCost, Profile
from cluster.sim.scenarios import Scenario
from cluster.sim.settings import Settings
from cluster.sim.traces.generated import Recipe

_AUTO = RolesConfig(mode="auto")
_BY_ORDER = RolesConfig(mode="off", drain_timeout_s=4.0, step_timeout_s=3.0)
_SIX = Settings(num_prefill=2, num_decode=4, seed=1, check_interval=2000, ttft_s=1.0, tpot_s=0.02, roles=_AUTO)
_STEADY = Recipe(requests=120, rate=8.0, prompt=1500, output=150, pause=2.0)
_TWO_ROUTERS = replace(_SIX, num_routers=2, num_prefill=2, num_decode=3, roles=_BY_ORDER)
_SLOW = Profile(cost=LinearCost(prefill_token_s=1e-4, decode_s=4e-4))
"""A worker that few requests keep busy."""
_ORDER = "4 switch decode-0 role=prefill"
_BUSY = replace(_STEADY, requests=240, rate=14.0, output=500)
"""Something decodes on every worker at every moment."""
_BURSTS = replace(_STEADY, requests=320, prompt=9000, output=40, turns=1.0)


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
        "Prompts come in a burst: workers that only decode come to compute prompts within seconds.",
        settings=_SIX,
        recipe=_BURSTS,
        reshape=_burst,
    ),
    "roles_shift_and_back": Scenario(
        "Long prompts, then long answers, then long prompts again: workers go over to prompts, to answers, and to prompts again.",
        settings=replace(_SIX, profile=_SLOW, num_decode=3, tpot_s=0.012),
        recipe=Recipe(requests=480, rate=8.0, prompt=1000, output=160, turns=1.0, shift=1),
    ),
    "roles_one_of_each": Scenario(
        "One worker of each role: a burst of prompts draws the one that can be spared, and both kinds of work go on.",
        settings=replace(_SIX, num_prefill=1, num_decode=1, num_mixed=1),
        recipe=replace(_BURSTS, requests=160),
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
            recipe=_BUSY,
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
    "roles_stale_observations": Scenario(
        "A burst comes while the only router hears nothing of its workers, and later everything two seconds late: no switch is half done.",
        settings=_SIX,
        recipe=_BURSTS,
        reshape=_burst,
        faults=(
            "9.5 cut router-0 from=prefill-0,prefill-1,decode-0,decode-1,decode-2,decode-3 for=3",
            "12.5 late router-0 by=2 for=8",
        ),
    ),
    "roles_misfit_pin": Scenario(
        "A worker is pinned to a role that does not fit the load: it stays, others do what they can.",
        settings=_SIX,
        recipe=_BURSTS,
        reshape=_burst,
        faults=("2 pin decode-0", "2 pin decode-1", "2 pin decode-2"),
    ),
}
