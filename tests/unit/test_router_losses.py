"""Stories about workers that are lost, refuse, restart or leave, and the requests they had; no network and no clock."""

from __future__ import annotations

from dataclasses import replace

from router_story import FREE, GENERATION, MIXED, MODEL, PD, Story, outputs, request, submits, the_submit

from router.events import Attach, Detach, FrameArrived, RequestArrived, WorkersChanged
from workers.errors import Refusal
from workers.kv_cache.block_hash import block_hashes
from workers.request import FinishReason, Output, Request
from workers.status import Role, WorkerAddress, WorkerStatus
from workers.wire.attach import WorkerFrame


def test_a_lost_worker_hands_its_requests_to_another_with_the_tokens_to_replay() -> None:
    story = Story(*PD)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    story.output(worker, "r#1", 0, 5, 6)
    other, submit = the_submit(story.lose(worker))
    assert other != worker and other.startswith("d-")
    assert submit.request == Request("r#2", (1, 2, 3), request().params, replay_token_ids=(5, 6))
    assert outputs(story.output(other, "r#2", 2, 7, finish=True))[0].token_ids == (7,)
    assert story.count("reruns_worker_lost") == 1 and story.count("replayed_tokens") == 2


def test_a_worker_that_falls_silent_is_given_up() -> None:
    story = Story(*MIXED, worker_stale_s=5.0)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    other = "m-1" if worker == "m-0" else "m-0"
    story.ticks(4.0)
    story.report(other, Role.MIXED)
    old = story.connections[worker]
    commands = story.ticks(2.0)
    assert Detach(worker, old) in commands and the_submit(commands)[0] == other
    late = Output("r#1", 0, (5,))
    assert outputs(story.tell(FrameArrived(worker, old, WorkerFrame(GENERATION, (late,))))) == []
    assert story.count("stale_frames") == 1 and story.count("workers_lost_stale") == 1


def test_a_router_that_stood_still_gives_nobody_up() -> None:
    """The frames of the meantime lie in its sockets: SIGSTOP, a long collection of garbage, no CPU time."""
    story = Story(*MIXED, worker_stale_s=5.0)
    for index in range(4):
        story.tell(RequestArrived(request(f"r{index}")))
    story.ticks(2.0)
    for pause_s in (5.1, 60.0):
        story.commands.clear()
        story.after(pause_s)
        story.after(0.1)
        assert story.commands == [] and story.count("workers_lost_stale") == 0
        for worker, _ in MIXED:
            story.report(worker, Role.MIXED)
    story.ticks(5.5)
    assert story.count("workers_lost_stale") == 2, "those that are silent while the router runs are"


def test_a_router_whose_every_tick_is_late_still_gives_up_who_is_silent() -> None:
    story = Story(*MIXED, worker_stale_s=5.0, tick_s=0.1)
    for _ in range(60):
        story.after(0.4)
    assert story.count("workers_lost_stale") == 2


def test_a_mass_silence_is_answered_a_few_workers_at_a_time() -> None:
    story = Story(*[(f"m-{index}", Role.MIXED) for index in range(30)], worker_stale_s=5.0)
    story.ticks(5.0)
    lost = []
    for _ in range(6):
        story.after(0.1)
        lost.append(story.count("workers_lost_stale"))
    assert max(after - before for before, after in zip([0, *lost], lost, strict=False)) <= 8
    assert lost[-1] == 30


def test_a_restarted_worker_is_not_taken_for_the_one_before() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    old = story.connections["m-0"]
    commands = story.tell(WorkersChanged((WorkerAddress("m-0", 2 << 32, "host:new"),)))
    assert Detach("m-0", old) in commands and Attach("m-0", old + 1, "host:new") in commands
    assert submits(commands) == []
    story.report("m-0", Role.MIXED, generation=1 << 32)
    assert story.core.counters["workers_lost_stale_process"] == 0 and not story.core.fleet.can_decode
    story.after(1.0)
    _, submit = the_submit(story.report("m-0", Role.MIXED, generation=2 << 32))
    assert submit.generation == 2 << 32 and submit.request.replay_token_ids == (5,)


def test_a_stream_that_leads_to_another_worker_is_closed() -> None:
    story = Story(("m-0", Role.MIXED))
    connection = story.connections["m-0"]
    status = WorkerStatus("m-7", GENERATION, Role.MIXED, MODEL, FREE)
    assert story.frame("m-0", WorkerFrame(GENERATION, status=status)) == [Detach("m-0", connection)]


def test_a_role_switch_leaves_running_requests_where_they_are() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    story.report(worker, Role.PREFILL, generation=GENERATION + 1)
    assert outputs(story.output(worker, "r#1", 0, 5))[0].token_ids == (5,)
    other, _ = the_submit(story.tell(RequestArrived(request("next"))))
    assert other != worker


def test_a_refusal_for_an_old_generation_is_answered_with_the_new_one() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    refusal = Output("r#1", 0, finish_reason=FinishReason.ERROR, refusal=Refusal.STALE_GENERATION)
    _, submit = the_submit(story.frame("m-0", WorkerFrame(GENERATION + 1, (refusal,))))
    assert submit.generation == GENERATION + 1 and submit.request.request_id == "r#2"


def test_a_busy_worker_is_left_for_another() -> None:
    for refusal in (Refusal.QUEUE_FULL, Refusal.SHUTTING_DOWN, Refusal.WRONG_ROLE):
        story = Story(*MIXED)
        worker, _ = the_submit(story.tell(RequestArrived(request())))
        assert the_submit(story.refuse(worker, "r#1", refusal))[0] != worker


def test_busy_workers_are_asked_again_with_growing_pauses_until_patience_ends() -> None:
    story = Story(("m-0", Role.MIXED), recovery_timeout_s=10.0)
    story.tell(RequestArrived(request()))
    attempt = 1
    while not outputs(story.refuse("m-0", f"r#{attempt}", Refusal.QUEUE_FULL)):
        attempt += 1
        while not submits(story.commands):
            story.after(0.1)
            story.report("m-0", Role.MIXED)
        story.commands.clear()
    assert 5 < attempt < 20 and story.now > 110.0
    (output,) = outputs(story.commands)
    assert output.refusal is Refusal.NO_WORKERS, "it was accepted: it has not to hear now that the queue is full"


def test_an_invalid_request_is_not_run_again() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    commands = story.refuse(worker, "r#1", Refusal.INVALID)
    assert [output.refusal for output in outputs(commands)] == [Refusal.INVALID] and submits(commands) == []


def test_an_internal_error_is_run_again_once_and_elsewhere() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    other, _ = the_submit(story.refuse(worker, "r#1", Refusal.INTERNAL))
    assert other != worker
    assert [output.refusal for output in outputs(story.refuse(other, "r#2", Refusal.INTERNAL))] == [Refusal.INTERNAL]


def test_a_request_that_kills_its_workers_is_given_up_before_it_has_killed_them_all() -> None:
    story = Story(*MIXED, max_lost_workers=3)
    story.tell(RequestArrived(request()))
    attempts = 0
    while not outputs(story.commands):
        attempts += len(submits(story.commands))
        (worker,) = [worker for worker, _ in submits(story.commands)] or [""]
        story.commands.clear()
        if worker:
            story.lose(worker)
        else:
            story.after(0.2)
            for name, connection in story.connections.items():
                if story.core.fleet.on_connection(name, connection):
                    story.report(name, Role.MIXED, GENERATION + (attempts << 32))  # it was started again
    assert attempts == 3 and outputs(story.commands)[0].refusal is Refusal.WORKERS_DIED


def test_two_workers_are_what_a_request_may_cost() -> None:
    story = Story(*MIXED)
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)  # it had begun when the first one died
    other, _ = the_submit(story.lose("m-0"))
    assert [output.refusal for output in outputs(story.lose(other))] == [Refusal.WORKERS_DIED]


def test_a_worker_that_is_back_with_what_it_ran_was_not_killed() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    for attempt in range(1, 5):
        assert not outputs(story.lose("m-0"))
        story.after(3.0)
        story.report("m-0", Role.MIXED)
        story.after(3.0)
        assert story.core.flights.num_running == 1, attempt


def test_a_request_that_makes_progress_survives_any_number_of_losses() -> None:
    story = Story(("m-0", Role.MIXED), max_attempts=2)
    story.tell(RequestArrived(request(max_tokens=64)))
    for position in range(20):
        assert outputs(story.output("m-0", f"r#{position + 1}", position, position))
        story.lose("m-0")
        story.after(3.0)
        story.report("m-0", Role.MIXED)


def test_a_request_waits_for_a_worker_to_come_back_and_not_for_ever() -> None:
    story = Story(("m-0", Role.MIXED), recovery_timeout_s=60.0)
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    story.lose("m-0")
    story.tell(RequestArrived(request("new")))
    assert outputs(story.after(59.0)) == []
    ended = outputs(story.after(2.0))
    assert {(output.request_id, output.refusal) for output in ended} == {
        ("r", Refusal.NO_WORKERS),
        ("new", Refusal.NO_WORKERS),
    }
    assert len(story.core.flights) == 0


def test_a_worker_that_leaves_the_cluster_ends_what_it_runs_and_gets_no_more() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    connection = story.connections[worker]
    story.tell(WorkersChanged(tuple(address for address in story.members if address.worker_id != worker)))
    assert the_submit(story.tell(RequestArrived(request("next"))))[0] != worker
    assert outputs(story.output(worker, "r#1", 0, 5, finish=True))
    assert Detach(worker, connection) in story.after(0.1)
    story.after(0.1)
    assert story.core.fleet.get(worker) is None


NEW_MODEL = replace(MODEL, fingerprint="new")


def test_another_model_is_taken_over_under_traffic_as_soon_as_nothing_of_the_old_one_runs() -> None:
    """There is always a request that waits, so waiting for none was waiting for ever."""
    story = Story(("m-0", Role.MIXED), recovery_timeout_s=60.0)
    story.tell(RequestArrived(request("begun")))
    story.output("m-0", "begun#1", 0, 5)
    story.lose("m-0")
    story.tell(RequestArrived(request("waits")))
    story.tell(RequestArrived(request("too-long", prompt=tuple(range(3000)))))
    story.after(0.5)
    commands = story.report(
        "m-0", Role.MIXED, generation=GENERATION + (1 << 32), model=replace(NEW_MODEL, max_model_len=2048)
    )
    assert story.core.fleet.model == replace(NEW_MODEL, max_model_len=2048)
    ended = {output.request_id: output.refusal for output in outputs(commands)}
    assert ended == {"begun": Refusal.NO_WORKERS, "too-long": Refusal.INVALID}, "no answer goes on with another model"
    assert the_submit(commands)[1].request.request_id == "waits#1"
    assert the_submit(story.tell(RequestArrived(request("next"))))[0] == "m-0"


def test_a_model_is_not_taken_over_while_the_old_one_runs_or_has_just_lost_its_stream() -> None:
    story = Story(*MIXED, recovery_timeout_s=60.0)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    other = "m-1" if worker == "m-0" else "m-0"
    story.report(other, Role.MIXED, model=NEW_MODEL)
    assert story.core.fleet.model == MODEL
    story.lose(worker)
    story.report(other, Role.MIXED, model=NEW_MODEL)
    assert story.core.fleet.model == MODEL and not story.core.fleet.can_decode, "it may be back at once"
    story.after(0.5)
    assert the_submit(story.report(worker, Role.MIXED))[0] == worker
    story.output(worker, "r#2", 0, 5, finish=True)
    story.lose(worker)
    story.now += 61.0
    story.report(other, Role.MIXED, model=NEW_MODEL)
    assert story.core.fleet.model == NEW_MODEL


def test_hashes_of_what_waits_are_those_of_the_new_models_blocks() -> None:
    story = Story(("m-0", Role.MIXED))
    story.lose("m-0")
    prompt = tuple(range(64))
    story.tell(RequestArrived(request("waits", prompt=prompt)))
    story.after(0.5)
    story.report("m-0", Role.MIXED, generation=GENERATION + (1 << 32), model=replace(NEW_MODEL, block_size=16))
    (flight,) = story.core.flights.running_on(next(iter(story.core.fleet)))
    assert flight.hashes == block_hashes(prompt, 16)


def test_reconnecting_backs_off() -> None:
    story = Story(("m-0", Role.MIXED))
    tries = 0
    for _ in range(100):
        story.lose("m-0")
        tries += sum(isinstance(command, Attach) for command in story.after(0.1))
    assert 5 <= tries <= 12
