"""What becomes of a handoff whose two ends hear of each other in any order, with any fault between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from handoff_wire import DONE, PROMPT, Wire
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import Refusal
from workers.handoff.copier import describe_pieces
from workers.handoff.protocol import source_session as src
from workers.handoff.protocol import target_session as tgt
from workers.handoff.protocol.choices import Measured, Plan
from workers.handoff.protocol.messages import (
    CancelHandoff,
    HandoffAccepted,
    KvPieces,
    PrefillDone,
    PrefixDone,
    PrefixSubject,
    RunningSubject,
    SequenceMoved,
    Subject,
    TransportBroken,
)
from workers.handoff.protocol.transfer import TransferState
from workers.kv_memory.memory import KvLayout


@pytest.mark.parametrize("transports", [("shm",), ("grpc",), ("shm", "grpc")])
def test_blocks_travel_as_they_fill_and_the_source_is_released(transports: tuple[str, ...]) -> None:
    wire = Wire(transports)
    wire.begin()
    for filled in (0, 1, 3):
        wire.fill(filled)
        wire.run()
        assert len(wire.target.landed) == filled
    wire.finish_prefill()
    wire.run()
    assert [type(o) for o in wire.outcome] == [tgt.Land] and wire.released == [""]
    assert wire.source.state is wire.target.state is TransferState.LANDED
    assert wire.blocks_arrived() and wire.target.transport == transports[0]


def test_layers_travel_while_later_layers_are_computed() -> None:
    layout = KvLayout(16, 4, 8, 64, 256, "float32", 4)  # a layer of 1 MiB: each is a piece
    wire = Wire(layout=layout, num_blocks=2)
    wire.source.window_bytes = 64 << 20
    wire.begin()
    for layers in range(1, 5):
        wire.tell_source(src.Filled(wire.source_blocks, 0, 2, layers))
        wire.run()
        assert wire.sent_pieces[-2:] == [layers - 1, 4 + layers - 1]
    wire.tell_source(src.Filled(wire.source_blocks, 0, 2, 4))
    wire.tell_source(replace(DONE, num_pieces=8))
    wire.run()
    assert sorted(wire.sent_pieces) == list(range(8)) and wire.blocks_arrived() and wire.released == [""]


def test_a_held_prefix_is_not_sent() -> None:
    wire = Wire(first_block=2)
    wire.begin()
    wire.finish_prefill()
    wire.run()
    assert len(wire.sent_pieces) == 2 and wire.blocks_arrived()
    assert not wire.target_pool.block(wire.target_blocks[0], 0, 2).any()


@pytest.mark.parametrize("fault", ["spoil", "lose"])
def test_a_piece_that_is_spoiled_or_lost_is_sent_again_over_the_next_transport(fault: str) -> None:
    wire = Wire()
    wire.begin()
    getattr(wire, fault).add(1)
    wire.finish_prefill()
    wire.run()
    assert [type(o) for o in wire.outcome] == [tgt.Land]
    assert wire.blocks_arrived() and wire.target.transport == "grpc" and wire.target.num_degradations == 1
    # What has been acknowledged is not sent again.
    assert wire.sent_pieces.count(1) == 2 and wire.sent_pieces.count(0) == 1


def test_a_transport_that_cannot_be_connected_is_passed_over() -> None:
    wire = Wire()
    wire.broken = {"shm"}
    wire.begin()
    wire.finish_prefill()
    wire.run()
    assert wire.blocks_arrived() and wire.target.transport == "grpc" and wire.released == [""]


def test_when_no_transport_can_be_connected_both_ends_give_up() -> None:
    wire = Wire()
    wire.broken = {"shm", "grpc"}
    wire.begin()
    wire.run()
    assert wire.outcome == [tgt.Fail("broken", Refusal.INTERNAL)]
    assert wire.released == ["the receiver cancelled: broken"]


def test_a_sender_that_cannot_send_says_so_and_the_next_transport_is_taken() -> None:
    wire = Wire()
    wire.hold_sends = True
    wire.begin()
    wire.step()
    wire.fill(1)
    wire.run()
    wire.hold_sends = False
    (sent,) = wire.unfinished
    wire.unfinished = [replace(sent, reason="the socket broke")]
    wire.finish_sends()
    assert wire.up == [TransportBroken(0, "the socket broke")]
    wire.finish_prefill()
    wire.run()
    assert [type(o) for o in wire.outcome] == [tgt.Land] and wire.target.transport == "grpc" and wire.blocks_arrived()


def test_a_resend_that_would_come_too_late_makes_way_for_what_is_sooner() -> None:
    slow = Measured(bandwidth=1.0, own_rate=1000.0)
    for remaining_s, lands in ((1e6, True), (5.0, False)):
        wire = Wire()
        wire.target.plan = Plan(slow, deadline_s=remaining_s, num_tokens=256, others=())
        wire.begin()
        wire.lose = {1}
        wire.finish_prefill()
        wire.run()
        assert [type(o) for o in wire.outcome] == [tgt.Land if lands else tgt.Fail]
        assert len(wire.released) == 1 and bool(wire.released[0]) is not lands


def test_what_was_announced_before_the_choice_changed_means_nothing() -> None:
    wire = Wire(("shm", "grpc"))
    wire.begin()
    wire.step()
    wire.tell_target(TransportBroken(0, "broke"))
    before = set(wire.target.collecting)
    wire.tell_target(KvPieces(describe_pieces(wire.source_pool, wire.cut, [(0, 9)]), epoch=0))
    assert wire.target.collecting == before == set()


def test_a_transfer_that_keeps_spoiling_fails_and_frees_the_source() -> None:
    wire = Wire(("grpc",))
    wire.begin()
    wire.finish_prefill()
    while not wire.outcome:
        wire.spoil = {2}
        assert wire.step()
    assert isinstance(wire.outcome[0], tgt.Fail) and "3 re-sends" in wire.outcome[0].reason
    wire.run()
    assert len(wire.released) == 1 and "3 re-sends" in wire.released[0]


def test_a_failed_source_holds_its_blocks_until_nobody_reads_them() -> None:
    wire = Wire()
    wire.hold_sends = True
    wire.begin()
    wire.run()
    wire.fill(2)
    wire.tell_source(CancelHandoff("enough"))
    assert wire.source.state is TransferState.FAILED and wire.released == []
    wire.finish_sends()
    assert wire.released == ["the receiver cancelled: enough"]


def test_silence_expires_both_ends() -> None:
    wire = Wire()
    wire.is_cut = True
    wire.begin()
    wire.wait(5.5)
    assert wire.source.state is wire.target.state is TransferState.EXPIRED
    assert "silent" in wire.released[0]
    assert isinstance(wire.outcome[0], tgt.Fail) and wire.outcome[0].refusal is Refusal.WORKER_LOST
    assert wire.source.next_deadline_s() is wire.target.next_deadline_s() is None


def test_heartbeats_keep_a_slow_prefill_alive() -> None:
    wire = Wire()
    wire.begin()
    wire.run()
    wire.wait(60)
    wire.finish_prefill()
    wire.run()
    assert [type(o) for o in wire.outcome] == [tgt.Land]


@pytest.mark.parametrize(
    ("subject", "done", "lands"),
    [
        (RunningSubject("r"), SequenceMoved((7, 8), 150, 3), True),
        (PrefixSubject((1, 2, 3, 4)), PrefixDone(3, 3), True),
        (PrefixSubject((1, 2, 3, 4)), PrefixDone(0, 0), True),
        (RunningSubject("r"), SequenceMoved((7,), 900, 5), False),
        (RunningSubject("r"), PrefillDone(7, None, 4, 0, 0.1), False),
        (PROMPT, PrefillDone(7, None, 3, 0, 0.1), False),
    ],
)
def test_the_done_message_says_how_many_of_the_reserved_homes_count(subject: Subject, done, lands: bool) -> None:  # type: ignore[no-untyped-def]
    wire = Wire(subject=subject)
    wire.begin()
    wire.run()
    wire.fill(min(done.num_pieces, 4))
    wire.tell_source(done)
    wire.run()
    assert [type(o) for o in wire.outcome] == [tgt.Land if lands else tgt.Fail]
    assert wire.released == [""] if lands else len(wire.released) == 1


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_is_spoiled_duplicated_or_cut_off_nothing_lands_wrong(data: st.DataObject) -> None:
    wire = Wire(data.draw(st.sampled_from([("shm",), ("grpc",), ("shm", "grpc")])))
    wire.begin()
    filled = 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(
            st.sampled_from(
                ["step", "step", "step", "fill", "spoil", "lose", "break transport", "twice", "wait", "break"]
            )
        )
        if action == "step":
            wire.step()
        elif action == "fill":
            filled = min(filled + 1, 4)
            wire.fill(filled)
        elif action in ("spoil", "lose"):
            getattr(wire, action).add(data.draw(st.integers(0, 3)))
        elif action == "break transport":
            wire.up.append(TransportBroken(wire.target.epoch, "broke"))
        elif action == "twice" and wire.up:
            wire.up.insert(0, wire.up[0]) if not isinstance(wire.up[0], HandoffAccepted) else None
        elif action == "wait":
            wire.is_cut = data.draw(st.booleans())
            wire.wait(1)
        elif action == "break":
            wire.tell_target(tgt.HandoffLost("cut"))
            wire.tell_source(src.HandoffBroken("cut"))
            break
    wire.finish_prefill()
    wire.run()
    wire.is_cut = True
    wire.wait(100)
    assert len(wire.outcome) == 1 and len(wire.released) == 1
    if isinstance(wire.outcome[0], tgt.Land):
        assert wire.blocks_arrived()
