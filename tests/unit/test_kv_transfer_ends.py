"""What one end of a handoff promises alone: legal moves, leases, windows, and to let go of blocks last."""

from __future__ import annotations

import pytest
from builders import fake_layout
from handoff_wire import accepted, opening

from workers.errors import Refusal
from workers.handoff.copier import describe_pieces
from workers.handoff.protocol import source_session as src
from workers.handoff.protocol import target_session as tgt
from workers.handoff.protocol.messages import (
    CancelHandoff,
    HandoffRefused,
    KvPieces,
    Offer,
    PieceAck,
    ReleaseHandoff,
    UseTransport,
)
from workers.handoff.protocol.transfer import Lease, TransferState
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut


def test_a_failed_target_waits_for_what_writes_before_it_says_so() -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 4), opening(("grpc",)), ttl_s=5)
    session.open(0)
    assert session.handle(accepted("grpc"), 0) == [tgt.Connect(Offer("grpc", b""), 0, fake_layout())]
    session.handle(tgt.Connected(0), 0)
    pieces = describe_pieces(KvMemory(fake_layout()), session.cut, [(0, 1)])
    assert isinstance(session.handle(KvPieces(pieces), 0)[0], tgt.Collect)
    cancelled = tgt.HandoffLost("cancelled", Refusal.SHUTTING_DOWN, is_ours=True)
    assert session.handle(cancelled, 0) == [tgt.SendDown(CancelHandoff("cancelled")), tgt.CloseInbox()]
    assert session.state is TransferState.FAILED and session.next_deadline_s() is None
    assert session.handle(tgt.Collected((0,)), 0) == []
    assert session.handle(tgt.Closed(), 0) == [tgt.Fail("cancelled", Refusal.SHUTTING_DOWN)]
    assert session.handle(tgt.Closed(), 0) == session.handle(tgt.HandoffLost("again"), 0) == []


@pytest.mark.parametrize("piece", [{"piece": 9}, {"block": 2}, {"num_layers": 1}])
def test_a_piece_for_another_place_fails_the_transfer(piece: dict[str, int]) -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 4), opening(("grpc",)), ttl_s=5)
    session.open(0)
    session.handle(accepted("grpc"), 0)
    session.handle(tgt.Connected(0), 0)
    (good,) = describe_pieces(KvMemory(fake_layout()), session.cut, [(0, 1)])
    commands = session.handle(KvPieces((good._replace(**piece),)), 0)  # type: ignore[arg-type]
    assert [type(c) for c in commands] == [tgt.SendDown, tgt.CloseInbox] and session.state is TransferState.FAILED


def test_a_lease_names_the_moment_to_look_again() -> None:
    lease = Lease(ttl_s=5, heartbeat_s=1)
    lease.begin(10)
    assert lease.next_deadline_s == 11
    lease.spoke(14.5)
    assert (lease.expires_s, lease.next_deadline_s) == (15, 15)
    lease.heard(15)
    assert lease.next_deadline_s == 15.5


def test_a_choice_that_was_not_offered_ends_it_and_what_comes_later_changes_nothing() -> None:
    session = src.SourceSession(Cut(fake_layout(), 0, 1), accepted("grpc"), 5, 1)
    reason = "the receiver chose 'telepathy', which was not offered"
    assert session.handle(UseTransport("telepathy"), 0) == [src.SendUp(CancelHandoff(reason)), src.Release(reason)]
    assert session.handle(ReleaseHandoff(), 0) == []


def test_a_receiver_that_asks_for_everything_again_and_again_is_given_up() -> None:
    session = src.SourceSession(Cut(fake_layout(), 0, 1), accepted("grpc"), 5, 1)
    session.open(0)
    for epoch in range(src.MAX_EPOCH + 1):
        assert not any(isinstance(c, src.Release) for c in session.handle(UseTransport("grpc", epoch), 0))
    reason = f"the receiver chose epoch {src.MAX_EPOCH + 1} of at most {src.MAX_EPOCH}"
    again = session.handle(UseTransport("grpc", src.MAX_EPOCH + 1), 0)
    assert again == [src.SendUp(CancelHandoff(reason)), src.Release(reason)]


def test_a_release_of_what_never_started_is_a_failure() -> None:
    session = src.SourceSession(Cut(fake_layout(), 0, 1), accepted("grpc"), 5, 1)
    (release,) = session.handle(ReleaseHandoff(), 0)
    assert isinstance(release, src.Release) and release.reason and session.state is TransferState.FAILED


def test_a_refusal_reaches_the_caller_with_its_reason() -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 1), opening(), 5)
    session.open(0)
    refusal = HandoffRefused(Refusal.WRONG_ROLE, "decode-3 is a decode worker")
    assert session.handle(refusal, 0) == [tgt.CloseInbox()]
    assert session.handle(tgt.Closed(), 0) == [tgt.Fail("decode-3 is a decode worker", Refusal.WRONG_ROLE)]


def test_the_window_bounds_what_is_in_flight() -> None:
    session = src.SourceSession(Cut(fake_layout(), 0, 8), accepted("grpc"), 5, window_bytes=4096)
    session.open(0)
    session.handle(UseTransport("grpc"), 0)
    (command,) = session.handle(src.Filled(tuple(range(8)), 0, 8, 2), 0)
    assert isinstance(command, src.SendPieces) and len(command.pieces) == 2
    (command,) = session.handle(PieceAck((0,)), 0)
    assert isinstance(command, src.SendPieces) and len(command.pieces) == 1
