"""Named situations that a cluster must master, each small and always the same; their transcripts are kept in tests/sim/golden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.sim.faults import Fault, fault_of
from cluster.sim.load import TraceRequest
from cluster.sim.record import RunRecord
from cluster.sim.settings import Settings
from cluster.sim.simulation import Simulation
from cluster.sim.traces.generated import Recipe, generate
from cluster.sim.transcript import Transcript

_STEADY = Recipe(requests=80, rate=8.0, prompt=1500, output=150, pause=2.0)
_PAIRS = Settings(num_prefill=2, num_decode=3, seed=1, check_interval=10)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`reshape` changes when requests come."""

    about: str
    settings: Settings = _PAIRS
    recipe: Recipe = _STEADY
    faults: tuple[str, ...] = ()
    reshape: Callable[[Sequence[TraceRequest]], list[TraceRequest]] = list

    def run(self) -> tuple[RunRecord, str]:
        """The record and its transcript."""
        trace = self.reshape(list(generate(self.recipe, self.settings.seed, self.settings.profile.max_model_len)))
        faults: list[Fault] = [fault_of(text.split()) for text in self.faults]
        transcript = Transcript()
        run = Simulation(self.settings, trace, faults, transcript).run()
        return run, transcript.text(run, self.about)


def _at_once(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    return [replace(request, at_s=0.0) for request in trace]


def _with_lull(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    half = len(trace) // 2
    return [*trace[:half], *(replace(request, at_s=request.at_s + 60.0) for request in trace[half:])]


SCENARIOS = {
    "burst": Scenario("All requests arrive at once.", reshape=_at_once, recipe=replace(_STEADY, requests=200)),
    "lull": Scenario("Nothing arrives for a minute in mid-trace.", reshape=_with_lull),
    "worker_death_in_a_switch": Scenario(
        "A decode worker becomes a prefill worker, and dies while its sequences move away.",
        faults=("4 switch decode-0 role=prefill", "4.02 kill decode-0 restart=6"),
    ),
    "router_death": Scenario(
        "One of two routers dies; its clients ask the other one, which takes their requests up at the workers.",
        settings=replace(_PAIRS, num_routers=2),
        faults=("4 kill router-0 restart=5",),
    ),
    "partition": Scenario(
        "A decode worker is cut off from everybody for longer than a lease, and comes back.",
        faults=("4 cut decode-1 for=9",),
    ),
    "slow_worker": Scenario("A decode worker becomes ten times slower for a while.", faults=("3 slow decode-0 factor=10 for=5",)),
    "stale_events": Scenario(
        "A prefill worker is killed and comes back at once, while frames and handoffs of its former life are still on their way.",
        faults=("2 late prefill-0 by=0.4 for=4", "4 kill prefill-0 restart=0.05"),
    ),
    "drain_under_load": Scenario(
        "A decode worker drains under load: what runs there moves away, and it takes work again later.",
        faults=("4 drain decode-2", "7 undrain decode-2"),
    ),
}  # fmt: skip
