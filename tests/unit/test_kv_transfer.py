"""The two ends of a handoff, wired together without a network, so that every order of events can be tried."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import fake_layout, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import InvariantViolated, Refusal, TransferFailed
from workers.kv_transfer import source as src
from workers.kv_transfer import target as tgt
from workers.kv_transfer.copier import describe_pieces, same_shape, verify_pieces
from workers.kv_transfer.memory import KvLayout, KvMemory, MappedKvMemory
from workers.kv_transfer.messages import (
    CancelHandoff,
    HandoffAccepted,
    HandoffRefused,
    KvPieces,
    Offer,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    Prefix,
    PrefixDone,
    Prompt,
    ReleaseHandoff,
    Running,
    SequenceMoved,
    Subject,
    TransportBroken,
    UseTransport,
)
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.recovery import Measured, Plan
from workers.kv_transfer.transfer import LEGAL, Due, Lease, Transfer, TransferState
from workers.kv_transfer.transport import View
from workers.status import WorkerAddress

DONE = PrefillDone(7, None, 4, 0, 0.1)
PROMPT = Prompt(make_request(range(5, 261)))


def opening(transports: tuple[str, ...] = ("shm", "grpc"), subject: Subject = PROMPT) -> OpenHandoff:
    return OpenHandoff(
        target=WorkerAddress("decode-0", 1, "x:1"),
        host="here",
        source_generation=1,
        model_fingerprint="f",
        layout=fake_layout(),
        subject=subject,
        first_block=0,
        num_blocks=4,
        transports=transports,
    )


def accepted(*transports: str) -> HandoffAccepted:
    return HandoffAccepted(tuple(Offer(name, b"") for name in transports), fake_layout(), "here")


class Wire:
    """Both sessions, their pools, and messages in flight; `run` delivers in order until nothing moves.

    The bytes travel when the receiver collects. A transport in `broken` cannot be connected; pieces in `spoil` arrive with a
    flipped byte, those in `lose` do not arrive, each once.
    """

    def __init__(
        self,
        transports: tuple[str, ...] = ("shm", "grpc"),
        first_block: int = 0,
        num_blocks: int = 4,
        subject: Subject = PROMPT,
        layout: KvLayout | None = None,
    ) -> None:
        layout = layout or fake_layout()
        self.layout = layout
        self.cut = Cut(layout, first_block, num_blocks - first_block)
        self.source_pool, self.target_pool = KvMemory(layout), KvMemory(layout)
        self.source_pool.bytes[:] = np.random.default_rng(0).integers(0, 256, self.source_pool.bytes.size, np.uint8)
        self.source_blocks = tuple(range(9, 9 - num_blocks, -1))
        self.target_blocks = tuple(range(2, 2 + num_blocks))
        self.source = src.SourceSession(self.cut, accepted(*transports), ttl_s=5, window_bytes=4096)
        self.target = tgt.TargetSession(self.cut, opening(transports, subject), ttl_s=5)
        self.now = 0.0
        self.broken: set[str] = set()
        self.spoil: set[int] = set()
        self.lose: set[int] = set()
        self.outcome: list[object] = []
        self.released: list[str] = []
        self.up: list[object] = []
        self.down: list[object] = []
        self.sent_pieces: list[int] = []
        self.unfinished: list[src.Sent] = []
        self.hold_sends = False

    def begin(self) -> None:
        self.do_target(self.target.open(self.now))
        self.down.clear()
        self.do_source(self.source.open(self.now))

    def do_source(self, commands: list[src.SourceCommand]) -> None:
        for command in commands:
            match command:
                case src.Send(message):
                    self.up.append(message)
                case src.SendPieces(epoch, _, pieces):
                    self.sent_pieces += [number for number, _ in pieces]
                    self.tell_source(src.Described(epoch, describe_pieces(self.source_pool, self.cut, pieces)))
                    self.unfinished.append(src.Sent(epoch))
                    if not self.hold_sends:
                        self.finish_sends()
                case src.Release(reason):
                    self.released.append(reason)
                case src.StartExport():
                    pass

    def finish_sends(self) -> None:
        while self.unfinished:
            self.tell_source(self.unfinished.pop(0))

    def place(self, piece: int) -> View:
        slot = self.cut.slot(piece)
        return self.target_pool.block(self.target_blocks[slot.block], slot.first_layer, slot.num_layers)

    def do_target(self, commands: list[tgt.TargetCommand]) -> None:
        for command in commands:
            match command:
                case tgt.Send(message):
                    self.down.append(message)
                case tgt.Connect(offer, epoch, _):
                    is_broken = offer.transport in self.broken
                    self.tell_target(tgt.ConnectFailed(epoch, "broken") if is_broken else tgt.Connected(epoch))
                case tgt.Collect(pieces):
                    there = [p for p in pieces if p.piece not in self.lose]
                    self.lose -= {p.piece for p in pieces}
                    for p in there:
                        view = self.place(p.piece)
                        view[:] = self.source_pool.block(p.source_block, p.first_layer, p.num_layers)
                        if p.piece in self.spoil:
                            view[0] ^= 1
                            self.spoil.discard(p.piece)
                    good = verify_pieces(there, self.place)
                    bad = tuple(p.piece for p in pieces if p.piece not in good)
                    self.tell_target(tgt.Collected(good, bad, "spoiled" if bad else ""))
                case tgt.Close():
                    self.tell_target(tgt.Closed())
                case tgt.Land() | tgt.Fail():
                    self.outcome.append(command)

    def tell_source(self, event: src.SourceEvent) -> None:
        self.do_source(self.source.handle(event, self.now))

    def tell_target(self, event: tgt.TargetEvent) -> None:
        self.do_target(self.target.handle(event, self.now))

    def step(self) -> bool:
        """Delivers one message each way; False when nothing was in flight."""
        moved = bool(self.up or self.down)
        if self.up:
            self.tell_target(self.up.pop(0))  # type: ignore[arg-type]
        if self.down:
            self.tell_source(self.down.pop(0))  # type: ignore[arg-type]
        return moved

    def run(self) -> None:
        while self.step():
            pass

    def wait(self, seconds: float) -> None:
        """Time passes, and each end wakes when it said it must."""
        until = self.now + seconds
        while True:
            dues = [d for end in (self.source, self.target) if (d := end.next_deadline_s()) is not None and d <= until]
            if not dues:
                break
            self.now = max(self.now, min(dues))
            for end, tell in ((self.source, self.tell_source), (self.target, self.tell_target)):
                due = end.next_deadline_s()
                if due is not None and due <= self.now:
                    tell(Due())
            if not self.is_cut:
                self.run()
        self.now = until

    is_cut = False

    def fill(self, num_filled: int) -> None:
        self.tell_source(src.Filled(self.source_blocks, 0, num_filled, self.layout.num_layers))

    def finish_prefill(self) -> None:
        self.fill(len(self.source_blocks))
        self.tell_source(replace(DONE, num_pieces=self.cut.num_pieces))

    def blocks_arrived(self) -> bool:
        pairs = zip(self.source_blocks, self.target_blocks, strict=True)
        layers = self.layout.num_layers
        return all(
            np.array_equal(self.source_pool.block(a, 0, layers), self.target_pool.block(b, 0, layers))
            for index, (a, b) in enumerate(pairs)
            if index >= self.cut.first_block
        )


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


def test_a_failed_target_waits_for_what_writes_before_it_says_so() -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 4), opening(("grpc",)), ttl_s=5)
    session.open(0)
    assert session.handle(accepted("grpc"), 0) == [tgt.Connect(Offer("grpc", b""), 0, fake_layout())]
    session.handle(tgt.Connected(0), 0)
    pieces = describe_pieces(KvMemory(fake_layout()), session.cut, [(0, 1)])
    assert isinstance(session.handle(KvPieces(pieces), 0)[0], tgt.Collect)
    cancelled = tgt.Broken("cancelled", Refusal.SHUTTING_DOWN, is_ours=True)
    assert session.handle(cancelled, 0) == [tgt.Send(CancelHandoff("cancelled")), tgt.Close()]
    assert session.state is TransferState.FAILED and session.next_deadline_s() is None
    assert session.handle(tgt.Collected((0,)), 0) == []
    assert session.handle(tgt.Closed(), 0) == [tgt.Fail("cancelled", Refusal.SHUTTING_DOWN)]
    assert session.handle(tgt.Closed(), 0) == session.handle(tgt.Broken("again"), 0) == []


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


@pytest.mark.parametrize("piece", [{"piece": 9}, {"block": 2}, {"num_layers": 1}])
def test_a_piece_for_another_place_fails_the_transfer(piece: dict[str, int]) -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 4), opening(("grpc",)), ttl_s=5)
    session.open(0)
    session.handle(accepted("grpc"), 0)
    session.handle(tgt.Connected(0), 0)
    (good,) = describe_pieces(KvMemory(fake_layout()), session.cut, [(0, 1)])
    commands = session.handle(KvPieces((replace(good, **piece),)), 0)  # type: ignore[arg-type]
    assert [type(c) for c in commands] == [tgt.Send, tgt.Close] and session.state is TransferState.FAILED


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


def test_a_lease_names_the_moment_to_look_again() -> None:
    lease = Lease(ttl_s=5, heartbeat_s=1)
    lease.begin(10)
    assert lease.next_deadline_s == 11
    lease.spoke(14.5)
    assert (lease.expires_s, lease.next_deadline_s) == (15, 15)
    lease.heard(15)
    assert lease.next_deadline_s == 15.5


def test_illegal_moves_raise_and_change_nothing() -> None:
    for state, legal in LEGAL.items():
        for other in TransferState:
            transfer = Transfer(Lease(5), state)
            if other in legal:
                transfer.move(other)
                assert transfer.state is other
            else:
                with pytest.raises(InvariantViolated):
                    transfer.move(other)
                assert transfer.state is state
    session = src.SourceSession(Cut(fake_layout(), 0, 1), accepted("grpc"), 5, 1)
    reason = "the receiver chose 'telepathy', which was not offered"
    assert session.handle(UseTransport("telepathy"), 0) == [src.Send(CancelHandoff(reason)), src.Release(reason)]
    assert session.handle(ReleaseHandoff(), 0) == []


def test_a_release_of_what_never_started_is_a_failure() -> None:
    session = src.SourceSession(Cut(fake_layout(), 0, 1), accepted("grpc"), 5, 1)
    (release,) = session.handle(ReleaseHandoff(), 0)
    assert isinstance(release, src.Release) and release.reason and session.state is TransferState.FAILED


def test_a_refusal_reaches_the_caller_with_its_reason() -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 1), opening(), 5)
    session.open(0)
    refusal = HandoffRefused(Refusal.WRONG_ROLE, "decode-3 is a decode worker")
    assert session.handle(refusal, 0) == [tgt.Close()]
    assert session.handle(tgt.Closed(), 0) == [tgt.Fail("decode-3 is a decode worker", Refusal.WRONG_ROLE)]


def test_the_window_bounds_what_is_in_flight() -> None:
    session = src.SourceSession(Cut(fake_layout(), 0, 8), accepted("grpc"), 5, window_bytes=4096)
    session.open(0)
    session.handle(UseTransport("grpc"), 0)
    (command,) = session.handle(src.Filled(tuple(range(8)), 0, 8, 2), 0)
    assert isinstance(command, src.SendPieces) and len(command.pieces) == 2
    (command,) = session.handle(PieceAck((0,)), 0)
    assert isinstance(command, src.SendPieces) and len(command.pieces) == 1


@pytest.mark.parametrize(
    ("subject", "done", "lands"),
    [
        (Running("r"), SequenceMoved((7, 8), 150, 3), True),
        (Prefix((1, 2, 3, 4)), PrefixDone(3, 3), True),
        (Prefix((1, 2, 3, 4)), PrefixDone(0, 0), True),
        (Running("r"), SequenceMoved((7,), 900, 5), False),
        (Running("r"), PrefillDone(7, None, 4, 0, 0.1), False),
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
            wire.tell_target(tgt.Broken("cut"))
            wire.tell_source(src.Broken("cut"))
            break
    wire.finish_prefill()
    wire.run()
    wire.is_cut = True
    wire.wait(100)
    assert len(wire.outcome) == 1 and len(wire.released) == 1
    if isinstance(wire.outcome[0], tgt.Land):
        assert wire.blocks_arrived()


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 5), st.integers(1, 9), st.sampled_from([1, 64, 128]))
def test_a_cut_covers_every_layer_of_every_block_once(
    num_layers: int, num_heads: int, first: int, num_blocks: int, head_dim: int
) -> None:
    layout = KvLayout(16, num_layers, num_heads, 64, head_dim, "bfloat16", 2)
    cut = Cut(layout, first, num_blocks)
    seen = [
        (slot.block, layer)
        for slot in map(cut.slot, range(cut.num_pieces))
        for layer in range(slot.first_layer, slot.first_layer + slot.num_layers)
    ]
    assert seen == [(b, layer) for b in range(first, first + num_blocks) for layer in range(num_layers)]
    assert cut.pieces_before(first + num_blocks) == cut.num_pieces and cut.pieces_before(first) == 0
    with pytest.raises(IndexError):
        cut.slot(cut.num_pieces)


def test_a_pool_can_be_mapped_only_as_what_it_is() -> None:
    pool = KvMemory(fake_layout())
    pool.block(3, 0, 2)[:] = 42
    mapped = MappedKvMemory(pool.handle, pool.layout)
    assert (mapped.block(3, 0, 2) == 42).all()
    with pytest.raises(ValueError, match="read-only"):
        mapped.block(3, 0, 2)[:] = 1
    with pytest.raises(TransferFailed, match="nonce"):
        MappedKvMemory(replace(pool.handle, nonce=b"x" * 16), pool.layout)
    with pytest.raises(TransferFailed, match="layout says"):
        MappedKvMemory(pool.handle, fake_layout(17))
    with pytest.raises(TransferFailed, match="cannot be opened"):
        MappedKvMemory(replace(pool.handle, fd=9999), pool.layout)
    with pytest.raises(IndexError):
        pool.block(16, 0, 1)
    with pytest.raises(IndexError):
        pool.block(0, 1, 2)
    assert same_shape(pool.layout, fake_layout(99)) and not same_shape(pool.layout, fake_layout(16, 3))
    pool.close()
