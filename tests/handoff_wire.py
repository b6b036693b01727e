"""Both ends of a handoff, wired together without a network, so that every order of events can be tried."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from builders import fake_layout, make_request

from workers.handoff.copier import describe_pieces, verify_pieces
from workers.handoff.protocol import source_session as src
from workers.handoff.protocol import target_session as tgt
from workers.handoff.protocol.messages import HandoffAccepted, Offer, OpenHandoff, PrefillDone, PromptSubject, Subject
from workers.handoff.protocol.transfer import Due
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_memory.pieces import Cut
from workers.status import WorkerAddress
from workers.transports.contract import View

DONE = PrefillDone(7, None, 4, 0, 0.1)


PROMPT = PromptSubject(make_request(range(5, 261)))


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
                case src.SendUp(message):
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
                case tgt.SendDown(message):
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
                case tgt.CloseInbox():
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
