"""What the store answers, late, twice or in another order, is taken for that which it answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from roles_story import fleet, seen

from cluster.roles.carrying_out import AGAIN_S, Execution
from cluster.roles.config import RolesConfig
from cluster.roles.events import Command, SetDraining, Write, Wrote
from cluster.roles.mirror import StoreMirror
from cluster.roles.records import SWITCHES, encode
from cluster.roles.switches import Phase, RoleSwitch
from cluster.store.store import ABSENT, Entry, Snapshot
from workers.status import Role

KEY = SWITCHES + "decode-0"
ASKED = RoleSwitch("1", "decode-0", Role.DECODE, Role.PREFILL, 1, "asked")


class Told:
    """An execution, and what the store shows to it."""

    def __init__(self) -> None:
        self.execution, self.mirror = Execution(RolesConfig(), "router-0", lambda now: now), StoreMirror()
        self.mirror.take(Snapshot("life", ()))

    def show(self, value: str, version: int) -> None:
        self.mirror.take(Snapshot("life", (Entry(KEY, value, version),)))

    def show_nothing(self) -> None:
        self.mirror.take(Snapshot("life", ()))

    def advance(self, now: float) -> list[Write]:
        return writes(self.execution.advance({}, self.mirror, now))

    @property
    def version(self) -> int | None:
        """Of the phase that is in the store; None: it is being written."""
        return self.execution.running["decode-0"].version


def writes(commands: list[Command]) -> list[Write]:
    return [command for command in commands if isinstance(command, Write)]


@pytest.fixture
def told() -> Told:
    return Told()


def test_an_answer_that_the_mirror_has_overtaken_is_not_taken_for_the_next_phases(told: Told) -> None:
    """With the version of the phase before, the phase after would be refused as another controller's."""
    (first,) = writes(told.execution.begin(ASKED, 0, 0.0))
    told.show(first.value, 5)
    told.advance(0.1)
    assert told.version == 5, "the mirror told"
    (second,) = told.advance(1000.0)
    assert (second.key, second.version) == (KEY, 5)
    told.execution.wrote(Wrote(KEY, first.value, 5), 1000.1)
    assert told.version is None, "the first phase's answer is late"
    told.execution.wrote(Wrote(KEY, second.value, 6), 1000.2)
    assert not told.execution.running and told.execution.ended[0].why != "another controller has changed it"


@pytest.mark.parametrize("first_is_first", [True, False])
def test_a_phase_that_was_written_twice_is_in_the_store_though_one_of_the_writes_is_refused(
    told: Told, first_is_first: bool
) -> None:
    (first,) = writes(told.execution.begin(ASKED, 0, 0.0))
    (again,) = told.advance(AGAIN_S)
    assert again == first, "over the same entry: of the two one counts"
    answers = [Wrote(KEY, first.value, 5), Wrote(KEY, again.value, None)]
    for answer in answers if first_is_first else reversed(answers):
        told.execution.wrote(answer, AGAIN_S + 0.1)
        told.advance(AGAIN_S + 0.1)
    assert told.version == 5 and not told.execution.ended


def test_a_refused_write_waits_for_what_the_store_shows(told: Told) -> None:
    """It is there all the same, when the answer that it was written is lost."""
    (first,) = writes(told.execution.begin(ASKED, 0, 0.0))
    told.execution.wrote(Wrote(KEY, first.value, None, failed=True), 0.5)
    (again,) = told.advance(AGAIN_S + 0.5)
    told.execution.wrote(Wrote(KEY, again.value, None), 2.0)
    assert not told.advance(2.0) and not told.execution.ended
    told.show(first.value, 5)
    told.advance(2.1)
    assert told.version == 5 and not told.execution.ended


def test_another_controllers_write_ends_the_switch_here_and_is_gone_on_with(told: Told) -> None:
    """A later write would else go over what the other one has done."""
    (first,) = writes(told.execution.begin(ASKED, 0, 0.0))
    others = replace(ASKED, number="2", phase=Phase.FENCING)
    told.show(encode(others), 5)
    told.execution.wrote(Wrote(KEY, first.value, None), 0.1)
    assert not told.advance(0.1)
    (ended,) = told.execution.ended
    assert (ended.number, ended.why) == ("1", "another controller has changed it")
    told.advance(0.2)
    assert told.execution.running["decode-0"].switch == others


def test_a_switch_begins_over_one_that_has_ended_though_its_entry_is_touched_meanwhile(told: Told) -> None:
    """The mark of a mended worker is taken from the last switch's entry while the next one is intended."""
    ended = replace(ASKED, number="0", phase=Phase.ROLLED_BACK, drained_here=True)
    told.show(encode(ended), 4)
    (first,) = writes(told.execution.begin(ASKED, 4, 0.0))
    told.execution.wrote(Wrote(KEY, first.value, None), 0.1)
    told.show(encode(replace(ended, drained_here=False)), 5)
    (again,) = told.advance(0.2)
    assert (again.version, again.value) == (5, first.value) and not told.execution.ended


def test_a_switch_whose_entry_is_gone_is_written_anew(told: Told) -> None:
    """A cluster that begins on the same store removes it, whoever leads still; no version over which it was written comes back."""
    (first,) = writes(told.execution.begin(ASKED, ABSENT, 0.0))
    told.execution.wrote(Wrote(KEY, first.value, 5), 0.1)
    (second,) = told.advance(100.0)
    assert second.version == 5 and "rolled_back" in second.value
    told.execution.wrote(Wrote(KEY, second.value, None), 100.1)
    (anew,) = told.advance(100.0 + AGAIN_S)
    assert (anew.version, anew.value) == (ABSENT, second.value)
    told.execution.wrote(Wrote(KEY, anew.value, 6), 102.0)
    assert not told.execution.running and told.execution.ended.pop().why == "the worker was not there"
    (next_one,) = writes(told.execution.begin(replace(ASKED, number="2"), ABSENT, 200.0))
    assert next_one.version == 6, "the mirror may not show it yet"
    told.execution.wrote(Wrote(KEY, next_one.value, None), 200.1)
    (again,) = told.advance(200.0 + AGAIN_S)
    assert (again.version, again.value) == (ABSENT, next_one.value), "or it is gone"


def test_a_store_that_shows_an_entry_late_keeps_it(told: Told) -> None:
    (first,) = writes(told.execution.begin(ASKED, ABSENT, 0.0))
    told.execution.wrote(Wrote(KEY, first.value, 5), 0.1)
    (second,) = told.advance(100.0)
    (anew,) = told.advance(100.0 + AGAIN_S)
    assert anew.version == ABSENT, "none is shown"
    told.execution.wrote(Wrote(KEY, anew.value, None), 101.1)
    told.show(first.value, 5)
    assert told.advance(101.2) == [second] and not told.execution.ended, "its own phase before is no other controller's"


def test_a_switch_that_the_store_does_not_take_ends_and_its_worker_takes_work_again(told: Told) -> None:
    busy = {worker.worker_id: worker for worker in [*fleet(1, 2), seen("decode-0", num_sequences=3, is_draining=True)]}
    draining = replace(ASKED, phase=Phase.DRAINING, drained_here=True)
    told.show(encode(draining), 5)
    told.execution.advance(busy, told.mirror, 0.0)
    (undoing,) = writes(told.execution.advance(busy, told.mirror, 50.0))
    for tried in range(1, 11):
        (again,) = told.execution.advance(busy, told.mirror, 50.0 + tried * AGAIN_S)
        assert again == undoing
    freed = told.execution.advance(busy, told.mirror, 61.0)
    assert freed == [SetDraining("decode-0", False)] and "decode-0" in told.execution.running, "until it shows"
    told.execution.advance(busy | {"decode-0": seen("decode-0", num_sequences=3)}, told.mirror, 61.1)
    (ended,) = told.execution.ended
    assert (ended.phase, ended.why) == (Phase.ROLLED_BACK, "the store did not take it in time")
    assert not told.execution.running
    told.execution.begin(ASKED, 5, 100.0)
    for tried in range(1, 30):
        told.execution.advance(busy, told.mirror, 100.0 + tried * AGAIN_S)
    assert not told.execution.running, "whatever the phase"
