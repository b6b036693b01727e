"""Several routers that know nothing of each other send a worker no more than one router would, and even out load without swinging over."""

from __future__ import annotations

from collections import Counter

import pytest
from router_story import FREE, MODEL, Story, request, submits

from cluster.sim.load import TraceRequest
from cluster.sim.settings import Settings
from cluster.sim.simulation import Simulation
from router.events import RequestArrived
from router.requests.move_planner import RebalanceLimits, Rebalancer
from workers.serving.sessions import SENDING_S, Sessions
from workers.status import Identity, Load, Role, WorkerStatus
from workers.wire.attach import WorkerFrame


def worst_queue(num_routers: int, workers: dict[str, int], spread_s: float, has_one_prefix: bool) -> int:
    """The most sequences that any worker had at once, of a burst that a balancer shares out among the routers."""
    settings = Settings(
        **workers,
        num_routers=num_routers,
        worker={"max_num_seqs": 16},
        sample_interval_s=0.02,
        max_leap_s=0.0,
    )
    texts = [0 if has_one_prefix else number for number in range(160)]
    trace = [TraceRequest(2.0 + spread_s * at, (text,), 1024, 1024, 40) for at, text in enumerate(texts)]
    run = Simulation(settings, trace).run()
    assert {record.outcome for record in run.requests} == {"ok"}
    return max(sample.running + sample.waiting for sample in run.samples)


@pytest.mark.parametrize("workers", [{"num_mixed": 3}, {"num_prefill": 2, "num_decode": 3}])
@pytest.mark.parametrize(("spread_s", "has_one_prefix"), [(0.0, False), (0.002, False), (0.002, True)])
def test_a_burst_over_four_routers_queues_little_more_at_any_worker_than_over_one(
    workers: dict[str, int], spread_s: float, has_one_prefix: bool
) -> None:
    """Without the rule of `WorkerEntry.show_load` the worst worker has 2.1 to 3.6 times as many."""
    alone = worst_queue(1, workers, spread_s, has_one_prefix)
    assert worst_queue(4, workers, spread_s, has_one_prefix) <= 1.3 * alone


class Told:
    """Sessions of a worker, and what was said last to each."""

    def __init__(self) -> None:
        identity = Identity("w-0", Role.MIXED, 1)
        self.sessions = Sessions(identity, Load(), self._status, 100, Counter())
        self.now = 100.0

    def _status(self) -> WorkerStatus:
        return WorkerStatus("w-0", 1, Role.MIXED, MODEL, FREE, num_routers=self.sessions.num_sending)

    def attach(self, *numbers: int) -> None:
        for number in numbers:
            self.sessions.attach(number, f"router-{number}")
            self.sessions.frame_wanted(number)

    def heard(self) -> dict[int, int]:
        """The number of routers that each session is told now."""
        told = {}
        for command in self.sessions.flush():
            frame = getattr(command, "frame", None)
            if isinstance(frame, WorkerFrame) and frame.status is not None:
                told[command.session] = frame.status.num_routers  # type: ignore[union-attr]
                self.sessions.frame_wanted(command.session)  # type: ignore[union-attr]
        return told

    def second(self) -> None:
        self.now += 1.0
        self.sessions.check_time(self.now)


def test_a_worker_says_how_many_routers_send_and_all_that_are_attached_while_none_has_begun() -> None:
    told = Told()
    told.attach(1, 2, 3)
    assert told.heard() == {1: 3, 2: 3, 3: 3}
    told.second()
    told.heard()
    told.sessions.sends(1, told.now)
    assert told.sessions.num_sending == 3  # the others may begin at the same moment
    for _ in range(2):
        told.second()
    assert told.heard() == {1: 1, 2: 1, 3: 1}
    told.sessions.sends(2, told.now)
    assert told.heard() == {1: 2, 2: 2, 3: 2}  # at once
    told.sessions.lose(2)
    told.sessions.lose(3)
    assert told.sessions.num_sending == 1
    told.attach(4)
    assert told.sessions.num_sending == 1  # it is there, and sends nothing
    for _ in range(round(SENDING_S) + 1):
        told.second()
    assert told.sessions.num_sending == 2


def test_routers_that_come_when_all_have_gone_are_counted_at_once() -> None:
    told = Told()
    told.attach(1, 2)
    told.second()
    told.sessions.sends(1, told.now)
    told.sessions.lose(1)
    told.sessions.lose(2)
    told.attach(3, 4)
    assert told.heard() == {3: 2, 4: 2}


def with_routers(story: Story, num_routers: int) -> Story:
    status = WorkerStatus(
        "m-0", story.members[0].generation, Role.MIXED, MODEL, FREE, pid=1, max_num_seqs=16, num_routers=num_routers
    )
    story.frame("m-0", WorkerFrame(status.generation, status=status))
    return story


@pytest.mark.parametrize(("num_routers", "num_sent"), [(1, 20), (0, 20), (4, 5), (32, 1)])
def test_a_router_takes_its_share_of_the_slots_that_a_report_shows(num_routers: int, num_sent: int) -> None:
    story = with_routers(Story(("m-0", Role.MIXED)), num_routers)
    for number in range(40):
        story.tell(RequestArrived(request(f"r{number}")))
    assert len(submits(story.commands)) == num_sent


def test_once_its_requests_have_spoken_a_router_sends_on() -> None:
    story = with_routers(Story(("m-0", Role.MIXED)), 4)
    for number in range(8):
        story.tell(RequestArrived(request(f"r{number}")))
    names = [submit.request.request_id for _, submit in submits(story.commands)]
    assert len(names) == 5
    for name in names:
        story.output("m-0", name, 0, 7)
    assert len(submits(story.commands)) == 8


def test_routers_that_see_the_same_imbalance_take_turns_and_share_the_rate() -> None:
    """Four at once would each move one; so the gap of 8 is gone after four moves, and nobody makes it one the other way round."""
    limits = RebalanceLimits(gap=8, pressed_gap=2, cooldown_s=5.0, moves_per_s=4.0)
    routers = [Rebalancer(limits, phase) for phase in (0.0, 0.25, 0.5, 0.75)]
    gap, moves = 8, []
    for tenth in range(40):
        now = 10 + tenth / 10
        moved = [router for router in routers if router.is_due(gap, False, now, num_routers=4)]
        for router in moved:
            router.moved(now, 4)
        moves.append(len(moved))
        gap -= 2 * len(moved)
    assert gap in (0, 1)
    assert max(moves) == 1
