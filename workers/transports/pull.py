"""The receiver's end where it reads the sender's pool itself: copies announced pieces on helper threads. Knows not where the pool is mapped from."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from workers.errors import TransferFailed
from workers.kv_memory.checksum import STREAMING_BYTES, copy_and_checksum
from workers.machine.limits import usable_cpus
from workers.transports.contract import IncomingPiece, View

log = logging.getLogger(__name__)

INLINE_BYTES = 4 << 20
"""Up to this many bytes are copied on the event loop: a fraction of a millisecond where the pages are there, and two changes of thread cost more."""
_GROUP_BYTES = 16 << 20
"""What one call into the kernel copies at most, so that a closing inbox is heard in a millisecond."""


NUM_HELPERS = min(2, usable_cpus())
"""Threads of one transport that share a copy, as one core does not use all of the memory's bandwidth. Sender and model want cores too."""

AnyInbox = TypeVar("AnyInbox", bound="PullInbox")


class Source(Protocol):
    """Bytes of a piece at the sender: a View, or what else the channel's `copy` understands."""

    @property
    def nbytes(self) -> int: ...


class ReadablePool(Protocol):
    """A sender's pool as its receiver sees it."""

    def block(self, block_id: int, first_layer: int, num_layers: int) -> Source:
        """Raises TransferFailed or IndexError when out of range."""
        ...


Pairs = list[tuple[int, View, Any]]
"""(piece number, its home in our pool, where the sender has it)."""
Copy = Callable[[Sequence[View], Sequence[Any], bool], Sequence[int]]


class PullChannel:
    """Copies out of one sender's pool. `use()` is None once the pool must not be read any more.

    `copy(targets, sources, is_large)` returns the checksums of what it copied; it raises TransferFailed, or OSError, on a helper
    thread. `is_large`: it is part of more than caches should give up.
    """

    def __init__(
        self, use: Callable[[], ReadablePool | None], helpers: ThreadPoolExecutor, copy: Copy = copy_and_checksum
    ) -> None:
        self._use: Callable[[], ReadablePool | None] | None = use
        self._helpers = helpers
        self.copy = copy
        self._inboxes: set[PullInbox] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no transfer uses the channel."""
        return not self._inboxes

    def pool(self) -> ReadablePool | None:
        return None if self._use is None else self._use()

    def inbox(self, transfer_id: str, place: Callable[[int], View]) -> PullInbox:
        return self.keep(PullInbox(self, place, self._helpers))

    def keep(self, inbox: AnyInbox) -> AnyInbox:
        """The channel is in use until the inbox is closed."""
        self._inboxes.add(inbox)
        return inbox

    def discard(self, inbox: PullInbox) -> None:
        self._inboxes.discard(inbox)

    async def close(self) -> None:
        self._use = None
        for inbox in tuple(self._inboxes):
            await inbox.settle()


class PullInbox:
    """One transfer. A copy that has begun ends before `close` returns; none begins afterwards."""

    inline_bytes = INLINE_BYTES

    def __init__(self, channel: PullChannel, place: Callable[[int], View], helpers: ThreadPoolExecutor) -> None:
        self._channel = channel
        self._place = place
        self._helpers = helpers
        self._is_closed = False
        self._running: set[asyncio.Future[None]] = set()
        self._checksums: dict[int, int] = {}

    async def collect(self, pieces: Sequence[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        pairs = self._pairs(pieces)
        arrived: set[int] = set()
        if sum(target.nbytes for _, target, _ in pairs) <= self.inline_bytes:
            self._copy(pairs, arrived, is_large=False)
        else:
            await self._copy_aside(pairs, arrived)
        return _split(pieces, arrived)

    def collect_now(self, pieces: Sequence[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """As ImmediateInbox."""
        pairs = self._pairs(pieces)
        if sum(target.nbytes for _, target, _ in pairs) > self.inline_bytes:
            return None
        arrived: set[int] = set()
        self._copy(pairs, arrived, is_large=False)
        return _split(pieces, arrived)

    def _pairs(self, pieces: Sequence[IncomingPiece]) -> Pairs:
        """Of those that have a place at both ends."""
        pool = self._channel.pool()
        pairs: Pairs = []
        if pool is not None and not self._is_closed:
            for piece in pieces:
                self._checksums.pop(piece.piece, None)
                with contextlib.suppress(TransferFailed, IndexError):
                    target = self._place(piece.piece)
                    source = pool.block(piece.source_block, piece.first_layer, piece.num_layers)
                    if source.nbytes == target.nbytes:
                        pairs.append((piece.piece, target, source))
        return pairs

    def checksum(self, piece: int) -> int | None:
        return self._checksums.get(piece)

    async def close(self) -> None:
        self._is_closed = True
        self._channel.discard(self)
        await self.settle()

    async def settle(self) -> None:
        """Returns when no copy is under way."""
        while self._running:
            await asyncio.wait(tuple(self._running))

    async def _copy_aside(self, pairs: Pairs, arrived: set[int]) -> None:
        is_large = sum(target.nbytes for _, target, _ in pairs) >= STREAMING_BYTES
        size = -(-len(pairs) // NUM_HELPERS)
        loop = asyncio.get_running_loop()
        copies: list[asyncio.Future[None]] = []
        for first in range(0, len(pairs), size):
            running = loop.run_in_executor(self._helpers, self._copy, pairs[first : first + size], arrived, is_large)
            copies.append(running)
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        # A cancelled waiter leaves the copies running; `close` waits for them.
        await asyncio.shield(asyncio.gather(*copies))

    def _copy(self, pairs: Pairs, arrived: set[int], is_large: bool) -> None:
        first = 0
        while first < len(pairs) and not self._is_closed and self._channel.pool() is not None:
            end, num_bytes = first, 0
            while end < len(pairs) and (end == first or num_bytes + pairs[end][1].nbytes <= _GROUP_BYTES):
                num_bytes += pairs[end][1].nbytes
                end += 1
            group = pairs[first:end]
            try:
                sources = [source for _, _, source in group]
                found = self._channel.copy([target for _, target, _ in group], sources, is_large)
            except (TransferFailed, OSError) as error:
                log.warning("KV could not be copied: %s", error)
                return
            for (piece, _, _), checksum in zip(group, found, strict=True):
                self._checksums[piece] = checksum
                arrived.add(piece)
            first = end


def _split(pieces: Sequence[IncomingPiece], arrived: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(arrived, lost) piece numbers."""
    lost = tuple(piece.piece for piece in pieces if piece.piece not in arrived)
    return tuple(piece.piece for piece in pieces if piece.piece in arrived), lost
