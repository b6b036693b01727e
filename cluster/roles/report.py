"""What operators are told of roles: the page of GET /admin/roles and the numbers of /metrics, from the core and what it has seen in the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.roles.core import RolesCore
from cluster.roles.records import decision_page
from cluster.roles.switches import Phase
from router.roles import RolesReport, SwitchCount

NUM_STEPS = 40
"""Steps of the audit that the page shows; the store has more."""


def report_of(core: RolesCore, now: float, wall_s: float) -> RolesReport:
    """At one moment."""
    leads = core.leads(now)
    counts = tuple(SwitchCount(*key, count) for key, count in sorted(core.execution.counts.items()))
    phases = tuple(
        (name, _quantile(sorted(times), 0.5), _quantile(sorted(times), 0.99))
        for name, times in sorted(core.execution.phase_s.items())
    )
    return RolesReport(_page(core, leads, wall_s), leads, core.planner.desired_workers, counts, phases, *core.gains)


def _page(core: RolesCore, leads: bool, wall_s: float) -> dict[str, Any]:
    mirror, running = core.mirror, core.execution.running
    workers = []
    for worker_id, worker in sorted(core.workers.items()):
        switch = running[worker_id].switch if worker_id in running else mirror.switches.get(worker_id)
        is_open = switch is not None and not switch.is_over
        workers.append(
            {
                "worker_id": worker_id,
                "role": worker.role.value,
                "desired": switch.target.value if switch is not None and is_open else worker.role.value,
                "phase": switch.phase.value if switch is not None and is_open else "",
                "since_s": switch.at_s if switch is not None and switch.phase is Phase.DONE else None,
                "by": switch.by if switch is not None and (is_open or switch.phase is Phase.DONE) else "",
                "pinned": worker_id in mirror.pinned,
                "draining": worker.is_draining,
                "connected": worker.is_up,
            }
        )
    mode = core.config.mode
    last = core.planner.last
    return {
        "leader": core.leadership.holder,
        "asked": core.name,
        "mode": mode if mode != "default" else "auto" if core.acts else "off",
        "workers": workers,
        "desired_workers": core.planner.desired_workers if leads else None,
        "last_look": decision_page(last, wall_s, "look") if leads and last is not None else None,
        "decisions": mirror.decisions()[::-1],
        "audit": mirror.audit()[-NUM_STEPS:],
    }


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
