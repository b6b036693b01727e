"""Stories about requests that move between decode workers: values in, values out; no network and no clock."""

from __future__ import annotations

from router_story import FREE, GENERATION, MODEL, Story, messages, outputs, request, submits, the_submit

from router.events import Command, RequestArrived, RequestCancelled, Tick
from router.job_part import JobPart
from router.requests.move_planner import RebalanceLimits, Rebalancer
from workers.errors import Refusal
from workers.request import FinishReason, Output
from workers.status import Load, Role, WorkerStatus
from workers.trust.permits import is_permit, make_key
from workers.wire.attach import Adopt, Cancel, Kept, Submit, WorkerFrame

DD = (("d-0", Role.DECODE), ("d-1", Role.DECODE), ("p-0", Role.PREFILL))


def drain(story: Story, worker: str, role: Role = Role.DECODE, is_draining: bool = True) -> None:
    status = WorkerStatus(worker, GENERATION, role, MODEL, FREE, pid=1, is_draining=is_draining)
    story.frame(worker, WorkerFrame(GENERATION, status=status))


def moved(story: Story, worker: str, name: str, position: int) -> list[Command]:
    output = Output(name, position, finish_reason=FinishReason.MOVED)
    return story.frame(worker, WorkerFrame(GENERATION, (output,)))


def other_of(worker: str) -> str:
    return "d-1" if worker == "d-0" else "d-0"


def begin(story: Story, num_tokens: int = 2) -> tuple[str, str, Submit]:
    """A request with some tokens whose worker drains: its source, its new home and what that one was asked."""
    source, _ = the_submit(story.tell(RequestArrived(request(max_tokens=64))))
    for position in range(num_tokens):
        story.output(source, "r#1", position, position + 5)
    drain(story, source)
    target, submit = the_submit(story.tell(Tick()))
    return source, target, submit


# ---- the way of one request ----


def test_one_that_another_router_has_moved_is_followed_from_where_its_client_is() -> None:
    story = Story(*DD)
    part = JobPart(Kept("j"), "r", at="d-0")
    story.tell(RequestArrived(request("r~1", max_tokens=64), part=part))
    story.output("d-0", "r~1#1", 0, 5, 6)
    gone = Output("r~1#1", 2, finish_reason=FinishReason.MOVED, message="d-1")
    commands = story.frame("d-0", WorkerFrame(GENERATION, (gone,)))
    assert submits(commands) == [] and messages(commands, Adopt) == [
        Adopt("r", "r~1#2", 2, make_key(b"", "r~1#2"), joins=True)
    ]
    (last,) = outputs(story.output("d-1", "r~1#2", 2, 7, finish=True))
    assert (last.position, last.token_ids) == (2, (7,)) and len(story.core.flights) == 0


def test_one_that_was_moved_to_a_worker_that_is_gone_is_run_again() -> None:
    story = Story(*DD)
    story.tell(RequestArrived(request("r~1", max_tokens=64), part=JobPart(Kept("j"), "r", at="d-0")))
    story.output("d-0", "r~1#1", 0, 5, 6)
    story.lose("d-1")
    gone = Output("r~1#1", 2, finish_reason=FinishReason.MOVED, message="d-1")
    _, submit = the_submit(story.frame("d-0", WorkerFrame(GENERATION, (gone,))))
    assert submit.request.replay_token_ids == (5, 6)


def test_a_running_request_leaves_a_draining_worker_while_its_tokens_go_on() -> None:
    story = Story(*DD)
    source, target, submit = begin(story)
    assert target == other_of(source) and submit.migration is not None
    assert (submit.migration.source.worker_id, submit.migration.request_id) == (source, "r#1")
    assert (submit.request.request_id, submit.request.replay_token_ids, submit.prefill_workers) == ("r#2", (5, 6), ())
    assert outputs(story.output(source, "r#1", 2, 7))[0].token_ids == (7,)
    assert submits(story.tell(Tick())) == [], "it is asked once"
    moved(story, source, "r#1", 3)
    (last,) = outputs(story.output(target, "r#2", 3, 8, finish=True))
    assert (last.request_id, last.position, last.finish_reason) == ("r", 3, "length")
    assert story.count("migrations_done") == 1 and len(story.core.flights) == 0


def test_the_new_home_and_nobody_else_is_permitted_to_take_the_request() -> None:
    story = Story(*DD)
    source, first = the_submit(story.tell(RequestArrived(request(max_tokens=64))))
    story.output(source, "r#1", 0, 5)
    drain(story, source)
    target, submit = the_submit(story.tell(Tick()))
    assert submit.migration is not None and is_permit(submit.migration.permit, first.key, target)
    assert not is_permit(submit.migration.permit, first.key, source)
    assert not is_permit(submit.migration.permit, submit.key, target), "each attempt has a key of its own"
    assert make_key(b"a", "r#1") != make_key(b"b", "r#1") != make_key(b"b", "r#2")


def test_what_the_new_home_says_early_waits_for_the_tokens_before_it() -> None:
    story = Story(*DD)
    source, target, _ = begin(story)
    assert outputs(story.output(target, "r#2", 4, 9)) == []
    assert outputs(story.output(target, "r#2", 5, 10)) == []
    assert [o.token_ids for o in outputs(story.output(source, "r#1", 2, 7))] == [(7,)]
    delivered = outputs(story.output(source, "r#1", 3, 8))
    assert [o.token_ids for o in delivered] == [(8,), (9,), (10,)]
    assert [o.position for o in delivered] == [3, 4, 5]
    assert moved(story, source, "r#1", 4) == [] and story.count("stale_outputs") == 0
    assert outputs(story.output(target, "r#2", 6, 11))[0].token_ids == (11,)


def test_a_source_that_does_not_know_it_has_been_left_is_told() -> None:
    story = Story(*DD)
    source, target, _ = begin(story)
    story.output(target, "r#2", 2, 7)
    commands = story.output(source, "r#1", 2, 7)
    assert outputs(commands) == [] and messages(commands, Cancel) == [Cancel("r#1")]
    silent = Story(*DD)
    source, target, _ = begin(silent)
    silent.output(target, "r#2", 2, 7)
    silent.now += 6.0
    for worker in ("d-0", "d-1", "p-0"):
        silent.report(worker, Role.PREFILL if worker == "p-0" else Role.DECODE)
    assert messages(silent.tell(Tick()), Cancel) == [Cancel("r#1")]


def test_a_target_that_refuses_or_dies_changes_nothing_and_it_is_tried_again_later() -> None:
    story = Story(*DD, migration_retry_s=0.5)
    source, target, _ = begin(story)
    story.refuse(target, "r#2", Refusal.QUEUE_FULL)
    assert outputs(story.output(source, "r#1", 2, 7))[0].token_ids == (7,)
    assert submits(story.tell(Tick())) == []
    again, submit = the_submit(story.after(0.6))
    assert again == target and submit.request.request_id == "r#3" and submit.request.replay_token_ids == (5, 6, 7)
    story.lose(target)
    assert outputs(story.output(source, "r#1", 3, 8, finish=True))[0].token_ids == (8,)
    assert story.count("migrations_refused") == 1 and story.count("migrations_lost") == 1


def test_a_source_that_dies_before_the_state_has_moved_has_its_requests_run_again() -> None:
    story = Story(*DD)
    source, target, _ = begin(story)
    commands = story.lose(source)
    worker, submit = the_submit(commands)
    assert worker == target and submit.migration is None and submit.request.replay_token_ids == (5, 6)
    assert messages(commands, Cancel) == [Cancel("r#2")]


def test_a_source_that_dies_after_the_state_has_moved_is_not_missed() -> None:
    story = Story(*DD)
    source, target, _ = begin(story)
    moved(story, source, "r#1", 2)
    assert submits(story.lose(source)) == []
    assert outputs(story.output(target, "r#2", 2, 7, finish=True))[0].token_ids == (7,)


def test_tokens_that_died_with_the_source_are_run_again() -> None:
    story = Story(*DD)
    source, target, _ = begin(story)
    story.output(target, "r#2", 4, 9)
    commands = story.lose(source)
    _, submit = the_submit(commands)
    assert outputs(commands) == [] and submit.request.replay_token_ids == (5, 6) and submit.migration is None
    assert messages(commands, Cancel) == [Cancel("r#2")]


def test_a_request_that_has_moved_to_a_lost_worker_is_run_again() -> None:
    story = Story(*DD)
    source, target, _ = begin(story)
    story.lose(target)
    drain(story, source, is_draining=False)
    worker, submit = the_submit(moved(story, source, "r#1", 2))
    assert worker == source and submit.request.replay_token_ids == (5, 6)


def test_a_request_that_ends_before_it_has_moved_ends_once() -> None:
    story = Story(*DD)
    source, _target, _ = begin(story)
    commands = story.output(source, "r#1", 2, 7, finish=True)
    assert len(outputs(commands)) == 1 and messages(commands, Cancel) == [Cancel("r#2")]
    assert len(story.core.flights) == 0 and len(story.core.flights.migrations) == 0


def test_a_client_that_leaves_frees_both_workers() -> None:
    story = Story(*DD)
    begin(story)
    cancels = messages(story.tell(RequestCancelled("r")), Cancel)
    assert sorted(cancel.request_id for cancel in cancels) == ["r#1", "r#2"]  # type: ignore[attr-defined]
    assert all(not entry.charges for entry in story.core.fleet)


def test_a_migration_that_takes_too_long_is_given_up() -> None:
    story = Story(*DD, migration_timeout_s=2.0)
    begin(story)
    assert messages(story.after(3.0), Cancel) == [Cancel("r#2")]
    assert story.count("migrations_timed_out") == 1


# ---- who moves ----


def test_nothing_new_goes_to_a_draining_worker_until_it_takes_work_again() -> None:
    story = Story(*DD)
    drain(story, "d-0")
    assert {the_submit(story.tell(RequestArrived(request(f"r{i}"))))[0] for i in range(4)} == {"d-1"}
    drain(story, "p-0", Role.PREFILL)
    assert the_submit(story.tell(RequestArrived(request("local"))))[1].prefill_workers == ()
    drain(story, "d-0", is_draining=False)
    assert the_submit(story.tell(RequestArrived(request("next"))))[0] == "d-0"


def test_requests_leave_a_worker_that_switches_to_prefill_or_leaves_the_cluster() -> None:
    for how in ("switches", "leaves"):
        story = Story(*DD)
        source, _ = the_submit(story.tell(RequestArrived(request())))
        story.output(source, "r#1", 0, 5)
        if how == "switches":
            story.report(source, Role.PREFILL, generation=GENERATION + 1)
        else:
            from router.events import WorkersChanged

            story.tell(WorkersChanged(tuple(a for a in story.members if a.worker_id != source)))
        target, submit = the_submit(story.tell(Tick()))
        assert target == other_of(source) and submit.migration is not None
        assert submit.migration.source.generation == GENERATION + (how == "switches")


def test_a_request_without_a_token_is_not_moved_nor_one_that_fits_nowhere() -> None:
    story = Story(*DD)
    source, _ = the_submit(story.tell(RequestArrived(request())))
    drain(story, source)
    assert submits(story.tell(Tick())) == []
    story.report(other_of(source), Role.DECODE, load=Load(num_free_blocks=1, num_blocks=1000))
    story.output(source, "r#1", 0, 5)
    assert submits(story.tell(Tick())) == []
    story.report(other_of(source), Role.DECODE)
    assert len(submits(story.tell(Tick()))) == 1


def test_only_so_many_move_at_once() -> None:
    story = Story(*DD, max_migrations=2)
    drain(story, "d-1")
    for index in range(5):
        story.tell(RequestArrived(request(f"r{index}")))
        story.output("d-0", f"r{index}#1", 0, 5)
    drain(story, "d-1", is_draining=False)
    drain(story, "d-0")
    assert len(submits(story.tell(Tick()))) == 2 and submits(story.tell(Tick())) == []
    assert len(submits(moved(story, "d-0", "r0#1", 1))) == 1, "the next one goes at once, not at the next tick"


def test_a_crowded_worker_gives_to_an_empty_one_until_they_are_even_and_not_back_again() -> None:
    story = Story(*DD, rebalance_gap=4, rebalance_moves_per_s=1000.0, settle_s=0.0)
    drain(story, "d-1")
    for index in range(8):
        story.tell(RequestArrived(request(f"r{index}", max_tokens=100)))
        story.output("d-0", f"r{index}#1", 0, 5)
    drain(story, "d-1", is_draining=False)
    on = {"d-0": 8, "d-1": 0}
    for _ in range(20):
        for worker, count in on.items():
            story.report(worker, Role.DECODE, load=Load(num_running=count, num_free_blocks=1000, num_blocks=1000))
        for target, submit in submits(story.after(0.1)):
            assert submit.migration is not None and target == "d-1"
            moved(story, "d-0", submit.migration.request_id, 1)
            on["d-0"] -= 1
            on["d-1"] += 1
    assert on == {"d-0": 4, "d-1": 4} and story.count("migrations_done") == 4


def test_nothing_is_rebalanced_when_the_operator_says_so() -> None:
    story = Story(*DD, rebalance=False, rebalance_gap=2)
    drain(story, "d-1")
    for index in range(8):
        story.tell(RequestArrived(request(f"r{index}", max_tokens=100)))
        story.output("d-0", f"r{index}#1", 0, 5)
    drain(story, "d-1", is_draining=False)
    story.report("d-0", Role.DECODE, load=Load(num_running=8, num_free_blocks=1000, num_blocks=1000))
    assert submits(story.tell(Tick())) == []


# ---- the policy alone ----

LIMITS = RebalanceLimits(gap=8, pressed_gap=2, cooldown_s=5.0, moves_per_s=2.0)


def test_a_clear_difference_is_needed_and_less_of_it_under_pressure() -> None:
    assert not Rebalancer(LIMITS).is_due(7, False, 0.0)
    assert Rebalancer(LIMITS).is_due(8, False, 0.0)
    assert Rebalancer(LIMITS).is_due(2, True, 0.0)
    assert not Rebalancer(LIMITS).is_due(1, True, 0.0)


def test_a_round_goes_on_until_even_then_rests_and_moves_are_rationed() -> None:
    policy = Rebalancer(LIMITS)
    assert policy.is_due(8, False, 0.0)
    policy.moved(0.0)
    assert not policy.is_due(6, False, 0.4)
    assert policy.is_due(6, False, 0.5)
    assert not policy.is_due(1, False, 2.0)
    assert not policy.is_due(20, False, 6.9), "it rests"
    assert policy.is_due(20, False, 7.0)


def with_preemptions(story: Story, worker: str, count: float) -> None:
    status = WorkerStatus(worker, GENERATION, Role.DECODE, MODEL, FREE, pid=1, counters=(("preemptions", count),))
    story.frame(worker, WorkerFrame(GENERATION, status=status))


def test_preemptions_are_pressure_for_a_while() -> None:
    story = Story(*DD, rebalance_gap=8, rebalance_pressed_gap=2)
    story.lose("d-0")
    story.after(0.2)
    with_preemptions(story, "d-0", 7.0)
    drain(story, "d-1")
    for index in range(4):
        story.tell(RequestArrived(request(f"r{index}", max_tokens=100)))
        story.output("d-0", f"r{index}#1", 0, 5)
    drain(story, "d-1", is_draining=False)
    crowded = WorkerFrame(GENERATION, load=Load(num_running=4, num_free_blocks=1000, num_blocks=1000))
    story.frame("d-0", crowded)
    assert submits(story.tell(Tick())) == [], "they were before our time"
    with_preemptions(story, "d-0", 8.0)
    story.now += 3.1
    story.frame("d-0", crowded)
    story.frame("d-1", WorkerFrame(GENERATION))
    assert submits(story.tell(Tick())) == [], "that was long ago"
    with_preemptions(story, "d-0", 9.0)
    story.frame("d-0", crowded)
    target, submit = the_submit(story.tell(Tick()))
    assert target == "d-1" and submit.migration is not None
