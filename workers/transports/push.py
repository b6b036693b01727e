"""The receiver's end where the sender pushes: which arriving piece goes where, and who waits for it. Knows no sockets; safe to use from helper threads."""

from __future__ import annotations

import asyncio
import hashlib
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from workers.errors import InvariantViolated, TransferFailed
from workers.transports.contract import IncomingPiece, View

MAX_PIECE_BYTES = 256 << 20
"""More than a layer of a block can have; a longer frame is not ours."""
_MAGIC = 0x324E5442  # "BTN2"
_HEADER = struct.Struct("<I16sIIIII")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Frame:
    """`length` bytes follow: those from `offset` on of a piece of `total` bytes. `key` is transfer_key(transfer id).

    `joins`: on transports that move several pieces at once, it moves together with the frame before it.
    """

    key: bytes
    piece: int
    offset: int
    length: int
    total: int
    joins: bool = False

    @property
    def is_last(self) -> bool:
        return self.offset + self.length == self.total


def transfer_key(transfer_id: str) -> bytes:
    """16 bytes that stand for a transfer id of any length."""
    return hashlib.blake2b(transfer_id.encode(), digest_size=16).digest()


def pack(frame: Frame) -> bytes:
    return _HEADER.pack(_MAGIC, frame.key, frame.piece, frame.offset, frame.length, frame.total, frame.joins)


def unpack(header: bytes | bytearray | memoryview) -> Frame:
    """Raises TransferFailed: after a header that makes no sense nothing on this stream does."""
    if len(header) < HEADER_BYTES:
        raise TransferFailed("a frame is shorter than its header")
    magic, key, piece, offset, length, total, joins = _HEADER.unpack_from(header)
    if magic != _MAGIC or total > MAX_PIECE_BYTES or offset + length > total or joins > 1:
        raise TransferFailed("a frame has no sensible header")
    return Frame(key, piece, offset, length, total, bool(joins))


CLOSE_GRACE_S = 2.0
"""How long a closing inbox waits for the piece that is just coming in, before it gives the whole channel up."""


class _Waiter:
    """One `collect`: what it still misses. `wake` is called on the loop once something has changed for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.event = asyncio.Event()
        self.missing: set[int] = set()
        self.lost: set[int] = set()
        self.progress = 0

    def wake(self) -> None:
        self.loop.call_soon_threadsafe(self.event.set)


class PushInbox:
    """One transfer. Pieces are written where they belong as they arrive, collected or not."""

    def __init__(self, inboxes: Inboxes, key: bytes, place: Callable[[int], View], timeout_s: float) -> None:
        self._inboxes = inboxes
        self._key = key
        self._place = place
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._arrived: Counter[int] = Counter()
        self._refused: set[int] = set()
        self._checksums: dict[int, int] = {}
        self._waiters: list[_Waiter] = []
        self._is_over = False
        self._num_writing = 0
        self._quiet: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    async def collect(self, pieces: Sequence[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        waiter = _Waiter(asyncio.get_running_loop())
        numbers = [piece.piece for piece in pieces]
        homeless = {number for number in numbers if self._home(number) is None}
        with self._lock:
            for number in numbers:
                if number in homeless or number in self._refused:
                    self._refused.discard(number)
                    waiter.lost.add(number)
                elif self._arrived[number]:
                    self._arrived[number] -= 1
                elif self._is_over:
                    waiter.lost.add(number)
                else:
                    waiter.missing.add(number)
            self._waiters.append(waiter)
        try:
            await self._wait(waiter)
        finally:
            with self._lock:
                self._waiters.remove(waiter)
        lost = waiter.lost | waiter.missing
        return tuple(n for n in numbers if n not in lost), tuple(n for n in numbers if n in lost)

    async def _wait(self, waiter: _Waiter) -> None:
        while waiter.missing:
            seen = waiter.progress
            try:
                await asyncio.wait_for(waiter.event.wait(), self._timeout_s)
            except TimeoutError:
                if waiter.progress == seen:
                    return

    @property
    def is_authenticated(self) -> bool:
        """As contract.SealedInbox."""
        return self._inboxes.is_authenticated

    def checksum(self, piece: int) -> int | None:
        return self._checksums.get(piece)

    async def close(self) -> None:
        with self._lock:
            self._give_up()
            if self._num_writing:
                self._quiet = asyncio.get_running_loop(), asyncio.Event()
        self._inboxes.discard(self._key, self)
        if self._quiet is not None:
            quiet = self._quiet[1]
            try:
                await asyncio.wait_for(quiet.wait(), CLOSE_GRACE_S)
            except TimeoutError:
                self._inboxes.abort()
                await quiet.wait()

    # ---- called by whoever reads the stream, on any thread ----

    def begin(self, frame: Frame) -> View | None:
        """Where the frame's bytes go; then `end` must follow. None: read them and throw them away."""
        home = self._home(frame.piece)
        with self._lock:
            if self._is_over or home is None:
                return None
            if home.nbytes != frame.total:
                self._note(frame.piece, is_good=False)
                return None
            self._num_writing += 1
        return home[frame.offset : frame.offset + frame.length]

    def end(self, frame: Frame, is_good: bool, checksum: int | None = None) -> None:
        """The frame's bytes are in place, or will never be. `checksum` is that of a frame that is a whole piece."""
        with self._lock:
            if checksum is None:
                self._checksums.pop(frame.piece, None)
            else:
                self._checksums[frame.piece] = checksum
            self._num_writing -= 1
            if not self._num_writing and self._quiet is not None:
                loop, event = self._quiet
                loop.call_soon_threadsafe(event.set)
            if not self._is_over and (frame.is_last or not is_good):
                self._note(frame.piece, is_good)

    def give_up(self) -> None:
        """The channel broke: what is missing is lost."""
        with self._lock:
            self._give_up()

    def _home(self, piece: int) -> View | None:
        try:
            return self._place(piece)
        except IndexError:
            return None

    def _note(self, piece: int, is_good: bool) -> None:
        taken = False
        for waiter in self._waiters:
            waiter.progress += 1
            if not taken and piece in waiter.missing:
                taken = True
                waiter.missing.discard(piece)
                if not is_good:
                    waiter.lost.add(piece)
                if not waiter.missing:
                    waiter.wake()
        if not taken:
            if is_good:
                self._arrived[piece] += 1
            else:
                self._refused.add(piece)

    def _give_up(self) -> None:
        self._is_over = True
        for waiter in self._waiters:
            waiter.lost |= waiter.missing
            waiter.missing.clear()
            waiter.wake()


class Inboxes:
    """All transfers of one channel. `abort` gives the channel up at once and may be called from any thread."""

    def __init__(self, abort: Callable[[], None], timeout_s: float, is_authenticated: bool = False) -> None:
        self.abort = abort
        self.is_authenticated = is_authenticated
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._open: dict[bytes, PushInbox] = {}
        self._is_broken = False

    @property
    def is_broken(self) -> bool:
        return self._is_broken

    @property
    def is_idle(self) -> bool:
        """Whether no transfer uses the channel."""
        return not self._open

    def open(self, transfer_id: str, place: Callable[[int], View]) -> PushInbox:
        key = transfer_key(transfer_id)
        inbox = PushInbox(self, key, place, self._timeout_s)
        with self._lock:
            if key in self._open:
                raise InvariantViolated(f"transfer {transfer_id} has an open inbox on this channel")
            self._open[key] = inbox
            is_broken = self._is_broken
        if is_broken:
            inbox.give_up()
        return inbox

    def find(self, key: bytes) -> PushInbox | None:
        with self._lock:
            return self._open.get(key)

    def discard(self, key: bytes, inbox: PushInbox) -> None:
        with self._lock:
            if self._open.get(key) is inbox:
                del self._open[key]

    def give_up(self) -> None:
        """The channel broke; from now on every piece is lost."""
        with self._lock:
            self._is_broken = True
            inboxes: Iterable[PushInbox] = tuple(self._open.values())
        for inbox in inboxes:
            inbox.give_up()
