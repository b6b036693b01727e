"""What operators see of requests and faults: where each request has been and why, how many are how old, who was lost and came back."""

from __future__ import annotations

from router_story import MIXED, Story, request, the_submit

from router.events import RequestArrived, RequestCancelled, Tick
from router.requests.journal import AGES_S, MAX_COUNTED, MAX_ENDED, MAX_FAULTS, MAX_STEPS, Journal, Way, by_age
from workers.status import Role, first_generation


def test_the_way_of_a_request_names_each_worker_and_what_made_it_go_on() -> None:
    story = Story(*MIXED)
    first, submitted = the_submit(story.tell(RequestArrived(request("long-job-0", max_tokens=8))))
    story.output(first, submitted.request.request_id, 0, 1, 2)
    story.now += 3.0
    second, again = the_submit(story.lose(first))
    (flying,) = story.core.flights.ways_of("chatcmpl-long-job")
    assert (flying.state, flying.num_tokens, flying.num_attempts, flying.decode_worker) == ("prefill", 2, 2, second)
    story.output(second, again.request.request_id, 2, 3, 4, 5, 6, 7, 8, finish=True)
    assert not story.core.flights.oldest()
    (way,) = story.core.flights.ways_of("long-job-0")
    assert [(step.what, step.worker_id) for step in way.steps] == [
        ("sent", first),
        ("first output", first),
        ("runs again", first),
        ("sent", second),
        ("first output", second),
        ("ended", second),
    ]
    assert "broken pipe" in way.steps[2].why and way.ended == "length" and way.state == "ended"
    assert [step.at_s - way.arrived_s for step in way.steps] == [0.0, 0.0, 3.0, 3.0, 3.0, 3.0]
    assert story.core.flights.ways_of("long") == (), "so short a name could be anybody's"


def test_a_lost_worker_and_what_became_of_its_requests_are_told_the_newest_first() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    story.lose(worker)
    story.now += 1.0
    story.tell(Tick())
    story.report(worker, Role.MIXED, generation=first_generation(2))
    faults = story.core.flights.journal.faults()
    assert [(fault.worker_id, fault.is_recovery) for fault in faults] == [
        (worker, True),
        (worker, True),
        (worker, False),
    ]
    words = ("new process", "1 requests", "broken pipe")
    assert all(word in fault.what for word, fault in zip(words, faults, strict=True)), faults


def test_requests_are_counted_by_age_and_those_behind_the_bound_with_the_youngest_that_was_looked_at() -> None:
    ages = (700.0, 130.0, 121.0, 60.0, 4.0, 0.5, 0.1)
    assert by_age((1000.0 - age for age in ages), len(ages), 1000.0) == (2, 1, 0, 1, 2, 1)
    assert by_age(iter(()), 0, 1000.0) == (0,) * (len(AGES_S) + 1)
    many = MAX_COUNTED + 500
    assert by_age((1000.0 - 100.0 for _ in range(many)), many, 1000.0) == (0, 0, 0, many, 0, 0)
    story = Story(*MIXED)
    for number in range(3):
        story.tell(RequestArrived(request(f"r{number}")))
        story.now += 4.0
    assert story.core.flights.ages(story.now) == (0, 1, 2, 0, 0, 0)
    story.tell(RequestCancelled("r0", "client"))
    (way,) = story.core.flights.ways_of("r0")
    assert way.ended == "cancelled: client"


def test_what_is_kept_is_bounded() -> None:
    story, journal = Story(*MIXED), Journal()
    story.tell(RequestArrived(request("r")))
    (flight,) = story.core.flights._flights.values()
    for number in range(3 * MAX_STEPS):
        flight.note(story.now, f"step {number}")
    assert len(flight.steps) == MAX_STEPS
    assert flight.steps[0].what == "sent" and flight.steps[-1].what == f"step {3 * MAX_STEPS - 1}"
    for number in range(2 * MAX_ENDED):
        journal.end(Way(f"r{number}", "", 0.0, 1, 0, 1, 1, "d", "p", "ended", "stop", ()))
        journal.fault(0.0, "lost", f"d-{number}")
    assert len(list(journal.ended())) == MAX_ENDED and next(journal.ended()).request_id == f"r{2 * MAX_ENDED - 1}"
    assert len(journal.faults()) == MAX_FAULTS
