"""The state machines are the tables in docs/state_machines.md: what is not in them raises and changes nothing."""

from __future__ import annotations

import typing
from dataclasses import replace
from enum import Enum, auto
from math import inf
from pathlib import Path
from typing import Any

import pytest
from builders import fake_layout, make_request
from handoff_wire import opening

from cluster.roles.switches import SWITCH
from workers.errors import InvariantViolated
from workers.group.formation import FORMATION, Formation
from workers.handoff.protocol import source_session, target_session
from workers.handoff.protocol.messages import CancelHandoff, HandoffAccepted, KvPiece, KvPieces, TransportBroken
from workers.handoff.protocol.source_session import SOURCE
from workers.handoff.protocol.target_session import TARGET
from workers.handoff.protocol.transfer import LIVE, OVER, TransferState
from workers.kv_memory.pieces import Cut
from workers.request import FinishReason, Output
from workers.scheduler.sequence import SEQUENCE, Kind, Sequence, State, Turn
from workers.serving import served_request
from workers.serving.kept_answers import KeptAnswers
from workers.serving.request_table import RequestTable
from workers.serving.served_request import SERVED_REQUEST, ServedRequest
from workers.state_table import Rule, StateTable
from workers.wire.attach import Kept

PAGE = Path(__file__).resolve().parents[2] / "docs" / "state_machines.md"
TABLES: tuple[StateTable[Any], ...] = (SEQUENCE, SERVED_REQUEST, SOURCE, TARGET, FORMATION, SWITCH)


def page() -> str:
    head, *_ = PAGE.read_text().partition("\n## ")
    return head + "".join(f"\n## {table.name[0].upper()}{table.name[1:]}\n\n{table.render()}\n" for table in TABLES)


def test_the_page_shows_the_tables_that_run() -> None:
    assert PAGE.read_text() == page(), f"write what `page()` in {Path(__file__).name} returns to docs/{PAGE.name}"


class Lamp(Enum):
    OFF = auto()
    ON = auto()
    BROKEN = auto()


class Push(Enum):
    PUSH = auto()
    FALL = auto()


def test_an_event_without_a_rule_raises_and_two_rules_for_one_are_none() -> None:
    rules = [
        Rule((Lamp.OFF,), (Push.PUSH,), Lamp.ON),
        Rule((Lamp.OFF, Lamp.ON), (Push.FALL,), Lamp.BROKEN),
    ]
    table = StateTable("a lamp", rules)
    assert table.step(Lamp.OFF, Push.PUSH).to is Lamp.ON and table.step(Lamp.ON, Push.FALL).to is Lamp.BROKEN
    with pytest.raises(InvariantViolated, match="a lamp: PUSH must not happen in BROKEN"):
        table.step(Lamp.BROKEN, Push.PUSH)
    assert [table.is_final(state) for state in Lamp] == [False, False, True]
    with pytest.raises(InvariantViolated, match="two rules for PUSH in OFF"):
        StateTable("a lamp", [*rules, Rule((Lamp.OFF,), (Push.PUSH,), None)])


def test_a_sequence_takes_a_turn_that_the_table_has_and_no_other_changes_it() -> None:
    for state in State:
        for turn in Turn:
            sequence = Sequence(1, make_request(range(5, 9), 2), Kind.LOCAL, 0, state=state)
            step = SEQUENCE.find(state, turn)
            if step is None:
                before = replace(sequence)
                with pytest.raises(InvariantViolated, match=f"{turn.name} must not happen in {state.name}"):
                    sequence.take(turn)
                assert sequence.state is before.state
            else:
                assert sequence.take(turn) is step.action and sequence.state is step.to
    assert SEQUENCE.is_final(State.FINISHED)


@pytest.mark.parametrize(
    ("table", "events", "never"),
    [
        (SOURCE, source_session.SourceEvent, set()),
        (
            TARGET,
            target_session.TargetEvent,
            # what only a command of the session brings, and that command is not given then
            {(TransferState.RESERVED, "Collected"), (TransferState.RESERVED, "Closed"), (TransferState.SENDING, "Closed")},
        ),
    ],
)  # fmt: skip
def test_both_ends_of_a_handoff_have_a_rule_for_whatever_the_other_may_say_in_every_state(
    table: StateTable[TransferState], events: Any, never: set[tuple[TransferState, str]]
) -> None:
    missing = {
        (state, event.__name__)
        for state in (*LIVE, *OVER)
        for event in typing.get_args(events)
        if table.find(state, event) is None
    }
    assert missing == never
    assert [table.is_final(state) for state in (*LIVE, *OVER)] == [False] * 2 + [True] * 3


def session(now: float = 0.0) -> target_session.TargetSession:
    made = target_session.TargetSession(Cut(fake_layout(), 0, 1), opening(), 5)
    made.open(now)
    return made


def test_a_sender_that_speaks_out_of_turn_fails_its_transfer_and_nothing_else() -> None:
    receiving = session()
    (cancel, close) = receiving.handle(TransportBroken(0, "nothing was asked for"), 0)
    assert isinstance(cancel, target_session.SendDown) and isinstance(cancel.message, CancelHandoff)
    assert isinstance(close, target_session.CloseInbox) and receiving.state is TransferState.FAILED
    early = session()
    assert early.handle(KvPieces((KvPiece(0, 0, 0, 1, 0, 0),)), 0) == []  # before anything was accepted: no inbox
    assert early.state is TransferState.RESERVED
    twice = session()
    accepted = HandoffAccepted((), fake_layout(), "there")
    assert isinstance(twice.handle(accepted, 0)[0], target_session.SendDown) and twice.state is TransferState.FAILED


def test_a_group_serves_only_when_all_have_met() -> None:
    formation = Formation(2, 1, 5.0, 5.0)
    for state in type(formation.state):
        for turn in {event for rule in FORMATION.rules for event in rule.events}:
            if FORMATION.find(state, turn) is None:
                formation.state = state
                with pytest.raises(InvariantViolated):
                    formation._take(turn, 1.0)  # type: ignore[arg-type]
                assert formation.state is state and formation.epoch == 0


def request_in(state: served_request.State) -> tuple[RequestTable, ServedRequest]:
    """A table with one request that has come into this state, and the request."""
    table = RequestTable(100, 10, 30.0, KeptAnswers(30.0, 1 << 20))
    ends = Output("a#1", 0, (7,), finish_reason=FinishReason.LENGTH)
    served = ServedRequest(1, "a", "a#1", make_request(range(5, 9), 2), (), None, inf, inf, 4, b"", 0, job=Kept("j"))
    table.add(served)
    if state.name in ("UNHEARD", "LEFT", "KEPT"):
        table.keep(served, ends)
        table.end(served, ends, 1)
    if state.name in ("ORPHANED", "LEFT"):
        table.orphan(4, 0.0, lambda _: 0)
    if state is served_request.State.KEPT:
        table.written(4, 1)
    if state is served_request.State.GONE:
        table.drop(served)
    return table, served


@pytest.mark.parametrize("state", served_request.State)
def test_a_request_is_in_the_books_of_its_state_and_no_turn_without_a_rule_changes_them(
    state: served_request.State,
) -> None:
    def books() -> tuple[object, ...]:
        heard = table.owner_of("a"), table.of(4, "a#1"), table.num_orphans
        return len(table), table.orphan_named("a"), table.orphan_as("a#1"), table.next_due_s, *heard, served.state

    table, served = request_in(state)
    runs, is_left = state.name in ("RUNNING", "ORPHANED"), state.name in ("ORPHANED", "LEFT")
    owner = (4, "a#1") if state.name in ("RUNNING", "UNHEARD") else None
    left: tuple[object, ...] = (served, served, 30.0) if is_left else (None, None, inf)
    if state is served_request.State.KEPT:
        left = (served, None, 30.0)
    assert books() == (runs, *left, owner, served if state.name == "RUNNING" else None, is_left, state)
    for turn in served_request.Turn:
        if SERVED_REQUEST.find(state, turn) is None:
            before = books()
            with pytest.raises(InvariantViolated, match=f"{turn.name} must not happen in {state.name}"):
                table._take(served, turn)
            assert books() == before
    assert SERVED_REQUEST.is_final(state) is (state is served_request.State.GONE)
