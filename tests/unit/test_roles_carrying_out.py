"""What the store answers to one phase of a switch is not taken for the answer to the next."""

from __future__ import annotations

from cluster.roles.carrying_out import Execution
from cluster.roles.config import RolesConfig
from cluster.roles.events import Write, Wrote
from cluster.roles.mirror import StoreMirror
from cluster.roles.records import SWITCHES
from cluster.roles.switches import RoleSwitch
from cluster.store.store import Entry, Snapshot
from workers.status import Role

KEY = SWITCHES + "decode-0"


def test_an_answer_that_the_mirror_has_overtaken_is_not_taken_for_the_next_phases() -> None:
    """With the version of the phase before, the phase after would be refused as another controller's."""
    execution, mirror = Execution(RolesConfig(), "router-0", lambda now: now), StoreMirror()
    (first,) = execution.begin(RoleSwitch("1", "decode-0", Role.DECODE, Role.PREFILL, 1, "asked"), 0, 0.0)
    assert isinstance(first, Write)
    mirror.take(Snapshot("life", (Entry(KEY, first.value, 5),)))
    execution.advance({}, mirror, 0.1)
    assert execution.running["decode-0"].version == 5, "the mirror told"
    (second,) = [each for each in execution.advance({}, mirror, 1000.0) if isinstance(each, Write)]
    assert (second.key, second.version) == (KEY, 5)
    execution.wrote(Wrote(KEY, 5), 1000.1)
    assert execution.running["decode-0"].version is None, "the first phase's answer is late"
    execution.wrote(Wrote(KEY, 6), 1000.2)
    assert execution._versions["decode-0"] == 6
