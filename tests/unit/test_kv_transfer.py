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
from workers.kv_transfer.copier import describe_pieces, place_pieces, same_shape
from workers.kv_transfer.memory import KvLayout, KvMemory, MappedKvMemory
from workers.kv_transfer.messages import (
    HandoffAccepted,
    HandoffRefused,
    KvPieces,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    ReleaseHandoff,
    UseTransport,
)
from workers.kv_transfer.pieces import Cut
from workers.status import WorkerAddress

DONE = PrefillDone(7, None, 4, 0, 0.1)


def opening(transports: tuple[str, ...] = ("shm", "grpc")) -> OpenHandoff:
    return OpenHandoff(
        target=WorkerAddress("decode-0", 1, "x:1"),
        source_generation=1,
        model_fingerprint="f",
        layout=fake_layout(),
        request=make_request(range(5, 261)),
        first_block=0,
        transports=transports,
    )


class Wire:
    """Both sessions, their pools, and messages in flight; `run` delivers in order until nothing moves."""

    def __init__(
        self, transports: tuple[str, ...] = ("shm", "grpc"), first_block: int = 0, num_blocks: int = 4
    ) -> None:
        self.cut = Cut(fake_layout(), first_block, num_blocks - first_block)
        self.source_pool, self.target_pool = KvMemory(fake_layout()), KvMemory(fake_layout())
        self.source_pool.bytes[:] = np.random.default_rng(0).integers(0, 256, self.source_pool.bytes.size, np.uint8)
        self.source_blocks = tuple(range(9, 9 - num_blocks, -1))
        self.target_blocks = tuple(range(2, 2 + num_blocks))
        accepted = HandoffAccepted(transports, fake_layout(), self.source_pool.handle)
        self.source = src.SourceSession(self.cut, accepted, timeout_s=5, window_bytes=4096)
        self.target = tgt.TargetSession(self.cut, opening(transports), timeout_s=5)
        self.mapped: MappedKvMemory | None = None
        self.now = 0.0
        self.spoil: set[int] = set()
        self.outcome: list[object] = []
        self.released: list[str] = []
        self.up: list[object] = []
        self.down: list[object] = []
        self.sent_pieces: list[int] = []

    def begin(self) -> None:
        self.do_target(self.target.open(self.now))
        self.down.clear()
        self.do_source(self.source.open(self.now))

    def do_source(self, commands: list[src.SourceCommand]) -> None:
        for command in commands:
            match command:
                case src.Send(message):
                    self.up.append(message)
                case src.SendPieces(pieces, with_data):
                    self.sent_pieces += [number for number, _ in pieces]
                    self.up.append(KvPieces(describe_pieces(self.source_pool, self.cut, pieces, with_data)))
                case src.Release(reason):
                    self.released.append(reason)
                case src.StartPrefill():
                    pass

    def do_target(self, commands: list[tgt.TargetCommand]) -> None:
        for command in commands:
            match command:
                case tgt.Send(message):
                    self.down.append(message)
                case tgt.MapPool(handle, layout):
                    self.mapped = MappedKvMemory(handle, layout)
                    self.tell_target(tgt.Mapped())
                case tgt.CopyPieces(pieces, transport):
                    if self.spoil:
                        pieces = tuple(
                            replace(p, checksum=p.checksum ^ 1) if p.piece in self.spoil else p for p in pieces
                        )
                        self.spoil -= {p.piece for p in pieces}
                    shared = self.mapped if transport == "shm" else None
                    good, bad = place_pieces(self.target_pool, self.target_blocks, pieces, shared)
                    self.tell_target(tgt.Copied(good, bad, "spoiled" if bad else ""))
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

    def fill(self, num_filled: int) -> None:
        self.tell_source(src.Filled(self.source_blocks, num_filled))

    def finish_prefill(self) -> None:
        self.fill(len(self.source_blocks))
        self.tell_source(replace(DONE, num_pieces=self.cut.num_pieces))

    def blocks_arrived(self) -> bool:
        pairs = zip(self.source_blocks, self.target_blocks, strict=True)
        return all(
            np.array_equal(self.source_pool.block(a, 0, 2), self.target_pool.block(b, 0, 2))
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
    assert wire.blocks_arrived() and wire.target.transport == transports[0]


def test_a_held_prefix_is_not_sent() -> None:
    wire = Wire(first_block=2)
    wire.begin()
    wire.finish_prefill()
    wire.run()
    assert len(wire.sent_pieces) == 2 and wire.blocks_arrived()
    assert not wire.target_pool.block(wire.target_blocks[0], 0, 2).any()


def test_a_spoiled_piece_is_sent_again_over_the_next_transport() -> None:
    wire = Wire()
    wire.begin()
    wire.spoil = {1}
    wire.finish_prefill()
    wire.run()
    assert [type(o) for o in wire.outcome] == [tgt.Land]
    assert wire.blocks_arrived() and wire.target.transport == "grpc" and wire.target.num_degradations == 1


def test_a_transfer_that_keeps_spoiling_fails_and_frees_the_source() -> None:
    wire = Wire(("grpc",))
    wire.begin()
    wire.finish_prefill()
    while not wire.outcome:
        wire.spoil = {2}
        assert wire.step()
    assert isinstance(wire.outcome[0], tgt.Fail) and "3 re-sends" in wire.outcome[0].reason
    wire.tell_source(src.Broken("closed"))
    assert wire.released == ["closed"]


def test_a_failed_target_waits_for_its_copies_before_it_says_so() -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 4), opening(("grpc",)), timeout_s=5)
    session.open(0)
    session.handle(HandoffAccepted(("grpc",), fake_layout()), 0)
    pool = KvMemory(fake_layout())
    pieces = describe_pieces(pool, session.cut, [(0, 1)], with_data=True)
    assert isinstance(session.handle(KvPieces(pieces), 0)[0], tgt.CopyPieces)
    assert session.handle(tgt.Broken("cancelled", Refusal.SHUTTING_DOWN), 0) == []
    assert session.handle(tgt.Copied((0,)), 0) == [tgt.Fail("cancelled", Refusal.SHUTTING_DOWN)]
    assert session.handle(tgt.Broken("again"), 0) == []


@pytest.mark.parametrize("piece", [{"piece": 9}, {"block": 2}, {"num_layers": 1}])
def test_a_piece_for_another_place_fails_the_transfer(piece: dict[str, int]) -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 4), opening(("grpc",)), timeout_s=5)
    session.open(0)
    session.handle(HandoffAccepted(("grpc",), fake_layout()), 0)
    (good,) = describe_pieces(KvMemory(fake_layout()), session.cut, [(0, 1)], with_data=True)
    (command,) = session.handle(KvPieces((replace(good, **piece),)), 0)  # type: ignore[arg-type]
    assert isinstance(command, tgt.Fail)


def test_a_piece_of_the_wrong_size_or_outside_the_peers_pool_is_bad_not_written() -> None:
    pool = KvMemory(fake_layout())
    cut = Cut(fake_layout(), 0, 1)
    (piece,) = describe_pieces(pool, cut, [(0, 1)], with_data=True)
    assert place_pieces(pool, [3], [replace(piece, data=b"short")], None) == ((), (0,))
    mapped = MappedKvMemory(pool.handle, pool.layout)
    assert place_pieces(pool, [3], [replace(piece, source_block=99)], mapped) == ((), (0,))


def test_silence_ends_both_sides() -> None:
    wire = Wire()
    wire.begin()
    wire.now = 5.5
    wire.tell_source(src.Tick())
    wire.tell_target(tgt.Tick())
    assert "silent" in wire.released[0]
    assert isinstance(wire.outcome[0], tgt.Fail) and wire.outcome[0].refusal is Refusal.WORKER_LOST


def test_heartbeats_keep_a_slow_prefill_alive() -> None:
    wire = Wire()
    wire.begin()
    wire.run()
    for second in range(1, 60):
        wire.now = float(second)
        wire.tell_source(src.Tick())
        wire.tell_target(tgt.Tick())
        wire.run()
    wire.finish_prefill()
    wire.run()
    assert [type(o) for o in wire.outcome] == [tgt.Land]


def test_illegal_moves_raise_and_change_nothing() -> None:
    session = src.SourceSession(Cut(fake_layout(), 0, 1), HandoffAccepted(("grpc",), fake_layout()), 5, 1)
    with pytest.raises(InvariantViolated):
        session._move(src.SourceState.RELEASED)
    assert session.state is src.SourceState.ACCEPTED
    assert session.handle(UseTransport("telepathy"), 0) == [
        src.Release("the receiver chose 'telepathy', which was not offered")
    ]
    assert session.handle(ReleaseHandoff(), 0) == []


def test_a_refusal_reaches_the_caller_with_its_reason() -> None:
    session = tgt.TargetSession(Cut(fake_layout(), 0, 1), opening(), 5)
    session.open(0)
    refusal = HandoffRefused(Refusal.WRONG_ROLE, "decode-3 is a decode worker")
    assert session.handle(refusal, 0) == [tgt.Fail("decode-3 is a decode worker", Refusal.WRONG_ROLE)]


def test_the_window_bounds_what_is_in_flight() -> None:
    layout = fake_layout()
    session = src.SourceSession(Cut(layout, 0, 8), HandoffAccepted(("grpc",), layout), 5, window_bytes=4096)
    session.open(0)
    session.handle(UseTransport("grpc"), 0)
    (command,) = session.handle(src.Filled(tuple(range(8)), 8), 0)
    assert isinstance(command, src.SendPieces) and len(command.pieces) == 2
    (command,) = session.handle(PieceAck((0,)), 0)
    assert isinstance(command, src.SendPieces) and len(command.pieces) == 1


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_is_spoiled_duplicated_or_cut_off_nothing_lands_wrong(data: st.DataObject) -> None:
    wire = Wire(data.draw(st.sampled_from([("shm",), ("grpc",), ("shm", "grpc")])))
    wire.begin()
    filled = 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["step", "step", "step", "fill", "spoil", "twice", "tick", "break"]))
        if action == "step":
            wire.step()
        elif action == "fill":
            filled = min(filled + 1, 4)
            wire.fill(filled)
        elif action == "spoil":
            wire.spoil.add(data.draw(st.integers(0, 3)))
        elif action == "twice" and wire.up:
            wire.up.insert(0, wire.up[0]) if not isinstance(wire.up[0], HandoffAccepted) else None
        elif action == "tick":
            wire.now += 1
            wire.tell_source(src.Tick())
            wire.tell_target(tgt.Tick())
        elif action == "break":
            wire.tell_target(tgt.Broken("cut"))
            wire.tell_source(src.Broken("cut"))
            break
    wire.finish_prefill()
    wire.run()
    if not wire.outcome:
        wire.now += 100
        wire.tell_target(tgt.Tick())
    wire.now += 100
    wire.tell_source(src.Tick())
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
