"""A switch is carried out whole or undone, whoever leads, dies, comes back or is cut off in the middle of it."""

from __future__ import annotations

import pytest
from roles_story import RolesStory, fleet, seen

from cluster.roles.config import RolesConfig
from cluster.roles.events import Resign, Tick
from cluster.roles.records import AUDIT, PINS, decode
from cluster.roles.switches import CONTROLLER, OPERATOR, SWITCH, Phase, RoleSwitch, judge
from router.roles import Order
from workers.status import Role

TO_PREFILL = Order("decode-0", Role.PREFILL)
BUSY = [seen("prefill-0"), seen("decode-0", num_sequences=6), seen("decode-1")]


def order_done(story: RolesStory, name: str = "order-1") -> str:
    story.run(60, lambda: name in story.answers)
    assert name in story.answers
    return story.answers[name]


def phases(story: RolesStory, worker_id: str = "decode-0") -> list[str]:
    return [phase for worker, phase in story.steps if worker == worker_id]


def test_an_idle_worker_is_fenced_at_once_and_a_busy_one_is_emptied_first() -> None:
    story = RolesStory(BUSY)
    story.run(1)
    story.order("router-0", Order("decode-1", Role.PREFILL), "idle")
    assert order_done(story, "idle") == "" and phases(story, "decode-1") == ["intended", "fencing", "verifying", "done"]
    story.order("router-0", Order("decode-1", Role.DECODE), "back")
    assert order_done(story, "back") == ""
    story.order("router-0", TO_PREFILL)
    assert order_done(story) == ""
    assert phases(story) == ["intended", "draining", "fencing", "verifying", "done"]
    worker = story.workers["decode-0"]
    assert (worker.role, worker.generation, worker.is_draining) == (Role.PREFILL, 2, False)
    steps = [decode(entry.value) for entry, _ in story.store.entries.values() if entry.key.startswith(AUDIT)]
    own = sorted((step["number"], step["step"]) for step in steps if step["switch"] == "order-1")
    assert [step for _, step in own] == phases(story), "one record of the audit for each step"


@pytest.mark.parametrize("phase", [Phase.INTENDED, Phase.DRAINING, Phase.FENCING, Phase.VERIFYING])
def test_a_new_leader_goes_on_where_the_last_one_died(phase: Phase) -> None:
    story = RolesStory(BUSY, ("router-0",))
    story.run(1)
    story.start("router-1")

    def die(switch: RoleSwitch) -> None:
        if switch.phase is phase:
            story.cores.pop("router-0", None)

    story.on_phase = die
    story.order("router-0", TO_PREFILL)
    story.run(30, lambda: story.switch("decode-0") is not None and story.switch("decode-0").is_over)  # type: ignore[union-attr]
    assert story.leader == "router-1"
    assert phases(story) == ["intended", "draining", "fencing", "verifying", "done"]
    worker = story.workers["decode-0"]
    assert (worker.role, worker.generation, worker.is_draining) == (Role.PREFILL, 2, False), (
        "one switch, one generation"
    )


def test_a_leader_that_cannot_reach_the_store_stops_before_another_begins() -> None:
    story = RolesStory(BUSY, ("router-0",))
    story.stuck.add("decode-0")
    story.run(1)
    story.start("router-1")
    story.order("router-0", TO_PREFILL)
    story.run(1)
    story.store.blocked.add("router-0")
    both = 0
    for _ in range(400):
        story.run(0.05)
        both += sum(core.leads(story.now) for core in story.cores.values()) > 1
    assert story.leader == "router-1" and not both
    story.store.blocked.clear()
    story.stuck.clear()
    story.run(30)
    assert phases(story)[-1] == "done" and story.workers["decode-0"].generation == 2
    assert order_done(story) == "", "who was asked first learns of it from the store"


def test_what_never_drains_is_undone_for_the_controller_and_done_for_an_operator() -> None:
    config = RolesConfig(mode="off", drain_timeout_s=3.0)
    story = RolesStory(BUSY, config=config)
    story.stuck.add("decode-0")
    story.run(1)
    story.order("router-0", TO_PREFILL)
    assert order_done(story) == "" and "undoing" not in phases(story)
    assert story.workers["decode-0"].num_sequences == 6, "what is left runs to its end there"

    story = RolesStory(BUSY, config=config)
    story.stuck.add("decode-0")
    story.run(1)
    core = story.cores["router-0"]
    own = RoleSwitch("auto-1", "decode-0", Role.DECODE, Role.PREFILL, 1, "prompts wait")
    for command in core.execution.begin(own, 0, story.now):
        story._handle("router-0", story._execute("router-0", command))  # type: ignore[arg-type]
    story.run(20)
    assert phases(story) == ["intended", "draining", "undoing", "rolled_back"]
    worker, ended = story.workers["decode-0"], story.switch("decode-0")
    assert (worker.role, worker.is_draining, worker.generation) == (Role.DECODE, False, 1)
    assert ended is not None and "did not move away" in ended.why


def test_a_worker_that_dies_in_mid_switch_comes_back_and_is_switched_or_takes_work_again() -> None:
    story = RolesStory(BUSY)
    story.run(1)
    story.order("router-0", TO_PREFILL)
    story.run(0.1)
    assert story.workers["decode-0"].is_draining
    story.change("decode-0", is_up=False)
    story.run(3)
    story.restart("decode-0")
    assert order_done(story) == ""
    assert story.workers["decode-0"].role is Role.PREFILL and not story.workers["decode-0"].is_draining

    story = RolesStory(BUSY, config=RolesConfig(mode="off", drain_timeout_s=3, step_timeout_s=2))
    story.run(1)
    core = story.cores["router-0"]
    own = RoleSwitch("auto-1", "decode-0", Role.DECODE, Role.PREFILL, 1, "prompts wait")
    for command in core.execution.begin(own, 0, story.now):
        story._handle("router-0", story._execute("router-0", command))  # type: ignore[arg-type]
    story.run(0.1)
    story.change("decode-0", is_up=False)
    story.run(20)
    assert phases(story)[-1] == "rolled_back"
    story.restart("decode-0")
    assert story.workers["decode-0"].is_draining, "it remembers that it was drained"
    story.run(5)
    assert not story.workers["decode-0"].is_draining, "nobody wants it drained any more"
    story.change("decode-0", is_draining=True)  # it leaves by itself later: that is its own business
    story.run(5)
    assert story.workers["decode-0"].is_draining


def test_the_last_of_its_kind_stays_unless_it_is_forced() -> None:
    story = RolesStory(fleet(1, 1))
    story.run(1)
    story.order("router-0", TO_PREFILL, "a")
    assert "no worker could decode" in order_done(story, "a")
    assert story.workers["decode-0"].generation == 1
    story.order("router-0", Order("decode-0", Role.MIXED), "b")
    assert order_done(story, "b") == ""
    story.order("router-0", Order("prefill-0", is_draining=True), "c")
    assert order_done(story, "c") == "" and story.workers["prefill-0"].is_draining
    story.order("router-0", Order("decode-0", is_draining=True), "d")
    assert "use force" in order_done(story, "d")
    story.order("router-0", Order("decode-0", is_draining=True, force=True), "e")
    assert order_done(story, "e") == "" and story.workers["decode-0"].is_draining


def test_orders_to_a_router_that_does_not_lead_are_carried_out_by_the_one_that_does() -> None:
    story = RolesStory(BUSY, ("router-0",))
    story.run(1)
    story.start("router-1")
    story.run(1)
    story.order("router-1", Order("decode-0", Role.PREFILL, is_pinned=True), "a")
    story.order("router-1", Order("decode-0", Role.MIXED), "b")
    assert order_done(story, "a") == "" and story.leader == "router-0"
    assert story.answers["b"] == "another order for this worker is under way"
    assert story.workers["decode-0"].role is Role.PREFILL and PINS + "decode-0" in story.store.entries
    story.order("router-1", Order("nobody", Role.PREFILL), "c")
    assert order_done(story, "c") == "worker 'nobody' is not connected"
    story.order("router-1", Order("decode-0", is_pinned=False), "d")
    assert order_done(story, "d") == "" and PINS + "decode-0" not in story.store.entries


def test_a_drained_worker_that_is_switched_stays_drained() -> None:
    story = RolesStory(BUSY)
    story.run(1)
    story.order("router-0", Order("decode-0", is_draining=True), "a")
    assert order_done(story, "a") == ""
    story.order("router-0", TO_PREFILL, "b")
    assert order_done(story, "b") == ""
    worker = story.workers["decode-0"]
    assert worker.role is Role.PREFILL and worker.is_draining
    story.order("router-0", Order("decode-0", is_draining=False), "c")
    assert order_done(story, "c") == "" and not story.workers["decode-0"].is_draining


def test_a_store_that_forgets_everything_is_told_of_switches_and_pins_again() -> None:
    story = RolesStory(BUSY, ("router-0", "router-1"))
    story.stuck.add("decode-0")
    story.run(1)
    story.order("router-0", Order("decode-1", is_pinned=True), "pin")
    story.order("router-0", TO_PREFILL)
    story.run(1)
    story.store.forget()
    story.kill("router-0")
    story.run(6)
    story.stuck.clear()
    story.run(20)
    assert phases(story)[-1] == "done" and PINS + "decode-1" in story.store.entries
    assert story.workers["decode-0"].role is Role.PREFILL and not story.workers["decode-0"].is_draining


def test_a_worker_that_does_nothing_it_is_told_ends_the_switch() -> None:
    story = RolesStory(fleet(1, 2), config=RolesConfig(mode="off", step_timeout_s=2))
    story.deaf.add("decode-0")
    story.run(1)
    story.order("router-0", TO_PREFILL)
    assert "did not take the role in time" in order_done(story)
    assert phases(story) == ["intended", "fencing", "undoing", "rolled_back"]
    story.deaf.clear()
    story.run(5)
    assert story.workers["decode-0"].role is Role.DECODE


def test_what_a_router_saw_long_ago_is_not_acted_on() -> None:
    story = RolesStory(BUSY)
    story.run(1)
    core = story.cores["router-0"]
    story.order("router-0", TO_PREFILL)
    story.workers.clear()
    before = list(story.steps)
    commands = core.handle(Tick(), story.now + 3.2)
    assert not [command for command in commands if type(command).__name__ in ("SetRole", "SetDraining")]
    assert story.steps == before


def test_whatever_a_worker_reports_the_table_has_a_rule_for_it() -> None:
    reports = [None] + [
        seen("decode-0", role, generation=generation, num_sequences=num, is_draining=drains, is_up=up)
        for role in Role
        for generation in (1, 2)
        for num in (0, 3)
        for drains in (False, True)
        for up in (False, True)
    ]
    for phase in Phase:
        for by in (CONTROLLER, OPERATOR):
            switch = RoleSwitch("s", "decode-0", Role.DECODE, Role.PREFILL, 1, "test", by, phase=phase)
            for worker in reports:
                for is_safe in (False, True):
                    for is_late in (False, True):
                        turn = judge(switch, worker, is_safe, is_late)
                        assert turn is None or SWITCH.find(phase, turn) is not None
                        assert turn is not None or not is_late or switch.is_over, "what is late goes on"


def test_without_the_store_an_order_is_refused_and_whoever_resigns_does_not_lead_again() -> None:
    story = RolesStory(BUSY)
    story.run(1)
    story.store.blocked.add("router-0")
    story.run(6)
    story.order("router-0", TO_PREFILL)
    assert "the store does not answer" in order_done(story)
    story.store.blocked.clear()
    story.run(3)
    assert story.cores["router-0"].leads(story.now)
    story._handle("router-0", Resign())
    assert not story.leader
    story.start("router-1")
    story.run(20)
    assert story.leader == "router-1"
