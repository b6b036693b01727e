"""A group forms when all its ranks are idle, ends for all when it ends for one, and says what was lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.group.formation import (
    AbortEpoch,
    BecameReady,
    Broke,
    Event,
    Expel,
    Formation,
    FormEpoch,
    Gone,
    HasFormed,
    Joined,
    ReportLost,
    Serve,
    State,
    StepBegan,
    StepEnded,
    Tick,
)  # fmt: skip


def group(size: int = 3, tensor: int = 1) -> Formation:
    formation = Formation(size, tensor, form_timeout_s=10, step_timeout_s=20)
    formation.members.add(0)
    for rank in range(1, size):
        formation.handle(Joined(rank), 0)
    return formation


def serving(size: int = 3, tensor: int = 1) -> Formation:
    formation = group(size, tensor)
    for rank in range(size):
        formation.handle(BecameReady(rank), 0)
    for rank in range(size):
        formation.handle(HasFormed(rank, formation.epoch), 1)
    assert formation.state is State.SERVING
    return formation


def test_an_epoch_begins_when_the_last_rank_is_ready() -> None:
    formation = group()
    assert formation.handle(BecameReady(1), 0) == formation.handle(BecameReady(0), 0) == []
    assert formation.handle(BecameReady(2), 0) == [FormEpoch(1)]
    assert formation.handle(HasFormed(0, 1), 1) == formation.handle(HasFormed(2, 1), 1) == []
    assert formation.handle(HasFormed(1, 1), 1) == [Serve(1)]


def test_a_lost_rank_ends_the_epoch_and_its_replacement_begins_the_next() -> None:
    formation = serving(4, tensor=2)
    assert formation.handle(Gone(3, "killed"), 2) == [
        ReportLost(3, "killed"), AbortEpoch(1, "rank 3 is lost: killed"),
    ]  # fmt: skip
    for rank in range(3):
        assert formation.handle(BecameReady(rank), 3) == []
    formation.handle(Joined(3), 4)
    assert formation.take_lost_pools() == (1,)
    assert formation.take_lost_pools() == ()
    assert formation.handle(BecameReady(3), 5) == [FormEpoch(2)]


def test_no_epoch_begins_while_a_rank_is_still_in_the_last_one() -> None:
    formation = serving()
    assert formation.handle(Broke(1, 1, "peer gone"), 2) == [AbortEpoch(1, "peer gone")]
    formation.handle(BecameReady(1), 3)
    formation.handle(BecameReady(2), 3)
    assert formation.state is State.GATHERING
    assert formation.handle(BecameReady(0), 4) == [FormEpoch(2)]


def test_a_rank_that_comes_back_as_another_process_has_lost_its_kv() -> None:
    formation = serving()
    commands = formation.handle(Joined(2), 5)
    assert [type(command) for command in commands] == [ReportLost, AbortEpoch]
    assert formation.take_lost_pools() == (2,)


def test_what_is_said_of_an_old_epoch_changes_nothing() -> None:
    formation = serving()
    assert formation.handle(Broke(1, 0, "late"), 2) == formation.handle(HasFormed(1, 0), 2) == []
    assert formation.state is State.SERVING
    assert formation.handle(Gone(7, "unknown"), 2) == []


def test_ranks_that_do_not_meet_try_again() -> None:
    formation = group()
    for rank in range(3):
        formation.handle(BecameReady(rank), 0)
    assert formation.handle(Tick(), 5) == []
    (command,) = formation.handle(Tick(), 11)
    assert isinstance(command, AbortEpoch)
    for rank in range(3):
        commands = formation.handle(BecameReady(rank), 12)
    assert commands == [FormEpoch(2)]


def test_a_rank_that_speaks_but_never_ends_its_step_is_expelled() -> None:
    formation = serving()
    formation.handle(StepBegan(1), 10)
    formation.handle(StepEnded(0, 1), 11)
    assert formation.handle(Tick(), 25) == []
    (command,) = formation.handle(Tick(), 31)
    assert isinstance(command, AbortEpoch)
    formation.handle(BecameReady(0), 31)
    formation.handle(BecameReady(1), 31)
    (expel,) = formation.handle(Tick(), 52)
    assert isinstance(expel, Expel) and expel.rank == 2
    assert formation.handle(Tick(), 53) == []


EVENTS = st.one_of(
    st.builds(Joined, st.integers(1, 2)),
    st.builds(BecameReady, st.integers(0, 2)),
    st.builds(HasFormed, st.integers(0, 2), st.integers(0, 3)),
    st.builds(Broke, st.integers(0, 2), st.integers(0, 3), st.just("broke")),
    st.builds(Gone, st.integers(1, 2), st.just("gone")),
    st.builds(StepBegan, st.integers(1, 5)),
    st.builds(StepEnded, st.integers(0, 2), st.integers(1, 5)),
    st.just(Tick()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 15)), max_size=40))
def test_whatever_happens_every_epoch_that_began_either_serves_or_ends(events: list[tuple[Event, float]]) -> None:
    formation = group()
    now, running = 0.0, 0
    for event, elapsed in events:
        now += elapsed
        for command in formation.handle(event, now):
            match command:
                case FormEpoch(epoch):
                    assert running == 0 and formation.members == {0, 1, 2}
                    running = epoch
                case AbortEpoch(epoch, _):
                    assert running == epoch
                    running = 0
                case Serve(epoch):
                    assert running == epoch
                case _:
                    pass
        assert (formation.state is State.GATHERING) == (running == 0)
