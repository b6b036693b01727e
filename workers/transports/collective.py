"""KV over a 2-rank group of torch.distributed for each pair of workers: headers go over a socket, pieces through the group (Gloo here).

Neighbouring pieces of a block lie together at both ends, so they travel as one tensor: an operation costs as much as half a MiB.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from workers.errors import TransferFailed
from workers.kv_memory.checksum import checksums
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.status import WorkerAddress
from workers.transports.contract import OutgoingPiece, View
from workers.transports.pair_group import RECEIVER, SENDER, GlooPair, PairGroup, host_store, reach_store
from workers.transports.push import HEADER_BYTES, Frame, Inboxes, PushInbox, pack, transfer_key, unpack
from workers.transports.tcp import Lane, TcpChannel, TcpTransport
from workers.transports.tcp_lanes import IncomingLane, OutgoingLink, outlast

PIECES_PER_BATCH = 64
_STORE_S = 10.0
_COUNT_BYTES = 4
"""Before the headers of a batch: how many there are."""

MakePair = Callable[[], PairGroup]


class CollectiveLink(OutgoingLink):
    """The sender's end. Making the group waits for the receiver, so it happens on the helper thread, before the first piece."""

    def __init__(self, lanes: list[socket.socket], timeout_s: float, make_pair: MakePair) -> None:
        super().__init__(lanes, timeout_s)
        self._pair = self.helpers.submit(make_pair)
        self._turn = asyncio.Lock()

    async def send(self, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        key = transfer_key(transfer_id)
        for first in range(0, len(pieces), PIECES_PER_BATCH):
            batch = pieces[first : first + PIECES_PER_BATCH]
            message = bytearray(len(batch).to_bytes(_COUNT_BYTES, "little"))
            runs: list[list[View]] = []
            for at, piece in enumerate(batch):
                size, joins = piece.view.nbytes, at > 0 and _follows(piece, batch[at - 1])
                message += pack(Frame(key, piece.piece, 0, size, size, joins))
                if joins:
                    runs[-1].append(piece.view)
                else:
                    runs.append([piece.view])
            async with self._turn:
                if self.is_broken:
                    raise TransferFailed("the receiver is gone")
                try:
                    await outlast(self.run(self._send_batch, message, [_joined(run) for run in runs]))
                except OSError as error:
                    self.stop()
                    raise TransferFailed(f"the connection beside the pair broke: {error}") from error
                except TransferFailed:
                    self.stop()
                    raise

    def _send_batch(self, message: bytearray, views: list[View]) -> None:
        pair = self._pair.result()
        lane = self.lanes[0]
        lane.setblocking(True)
        lane.sendall(message)
        pair.send(views)

    def stop(self) -> None:
        if self._pair.done() and self._pair.exception() is None and not self.is_broken:
            self._pair.result().abort()
        super().stop()


class CollectiveLane(IncomingLane):
    """The receiver's end. `made` ends with the group, or with why there is none."""

    def __init__(self, connection: socket.socket, inboxes: Inboxes, make_pair: MakePair, max_bytes: int) -> None:
        self.made: Future[PairGroup] = Future()
        self._make_pair = make_pair
        self._max_bytes = max_bytes
        super().__init__(connection, inboxes)

    def stop(self) -> None:
        super().stop()
        if self.made.done() and self.made.exception() is None:
            self.made.result().abort()

    def serve(self) -> None:
        try:
            pair = self._make_pair()
        except BaseException as error:
            self.made.set_exception(error)
            raise
        self.made.set_result(pair)
        scratch: View | None = None
        while (frames := self._read_headers()) is not None:
            runs: list[list[_Landing]] = []
            homes: list[View] = []
            waiting: deque[_Landing] = deque()
            try:
                for frame in frames:
                    inbox = self.inboxes.find(frame.key)
                    home = None if inbox is None else inbox.begin(frame)
                    landing = _Landing(frame, inbox, home)
                    if home is not None:
                        waiting.append(landing)
                    if frame.joins and runs:
                        runs[-1].append(landing)
                    else:
                        runs.append([landing])
                for run in runs:
                    wanted = [landing.home for landing in run if landing.home is not None]
                    if len(wanted) == len(run):
                        homes.append(_joined(wanted))
                    else:  # what nobody wants may overwrite itself
                        scratch = np.empty(self._max_bytes, np.uint8) if scratch is None else scratch
                        homes.append(scratch[: sum(landing.frame.length for landing in run)])
                for run, _ in zip(runs, pair.receive(homes), strict=True):
                    self._end(run, waiting)
            finally:
                for landing in waiting:
                    landing.end(is_good=False)

    def _end(self, run: list[_Landing], waiting: deque[_Landing]) -> None:
        """A run has come in; checksums are made now, while it is in this core's cache and the next run arrives."""
        is_whole = all(landing.home is not None for landing in run)
        for landing in run:
            if landing.home is not None:
                waiting.popleft()
                landing.end(is_whole)

    def _read_headers(self) -> list[Frame] | None:
        """None when the sender has hung up."""
        count = bytearray(_COUNT_BYTES)
        if not self.read(memoryview(count)):
            return None
        num_frames = int.from_bytes(count, "little")
        if num_frames > PIECES_PER_BATCH:
            raise TransferFailed("a batch says that it is longer than it can be")
        headers = memoryview(bytearray(num_frames * HEADER_BYTES))
        if not self.read(headers):
            return None
        frames = [unpack(headers[at : at + HEADER_BYTES]) for at in range(0, headers.nbytes, HEADER_BYTES)]
        num_bytes = 0
        for frame in frames:
            num_bytes = frame.length + num_bytes * frame.joins
            if num_bytes > self._max_bytes or frame.length != frame.total:
                raise TransferFailed("a piece is longer than a block")
        return frames


class _Landing:
    """A piece that is on its way; `home` None: nobody wants it."""

    def __init__(self, frame: Frame, inbox: PushInbox | None, home: View | None) -> None:
        self.frame = frame
        self.home = home
        self._inbox = inbox

    def end(self, is_good: bool) -> None:
        assert self._inbox is not None and self.home is not None
        self._inbox.end(self.frame, is_good, checksums([self.home])[0] if is_good else None)


def _follows(piece: OutgoingPiece, before: OutgoingPiece) -> bool:
    """Whether two pieces are neighbours in one block."""
    return (piece.source_block, piece.first_layer) == (before.source_block, before.first_layer + before.num_layers)


def _joined(views: Sequence[View]) -> View:
    """One view of neighbours in one pool. Raises TransferFailed when they are not."""
    end = views[0].ctypes.data
    for view in views:
        if view.ctypes.data != end:
            raise TransferFailed("pieces that travel together do not lie together")
        end += view.nbytes
    return np.lib.stride_tricks.as_strided(views[0], (end - views[0].ctypes.data,))


class GlooTransport(TcpTransport):
    """Negotiates, authenticates and notices the loss of a peer as `tcp` does; a sender's pairs meet in a TCPStore that it hosts."""

    name = "gloo"
    extra_fields = (("store", int),)

    def __init__(self, memory: KvMemory, listen_host: str, timeout_s: float) -> None:
        super().__init__(listen_host, timeout_s, num_lanes=1)
        self.memory = memory
        self._store: Any = None

    def extra_offer(self) -> dict[str, int]:
        if self._store is None:
            self._store = host_store(self.listen_host, _STORE_S)
        return {"store": self._store.port}

    def make_link(self, lanes: list[Lane], session: bytes) -> OutgoingLink:
        connections = [lane.connection for lane in lanes]
        return CollectiveLink(connections, self.timeout_s, lambda: self.make_pair(self._store, session, SENDER))

    async def make_channel(
        self,
        source: WorkerAddress,
        layout: KvLayout,
        offer: bytes,
        lanes: list[Lane],
        session: bytes,
        is_sealed: bool,
        extra: dict[str, int],
    ) -> TcpChannel:
        host = source.target.rpartition(":")[0].strip("[]")

        def make_pair() -> PairGroup:
            return self.make_pair(reach_store(host, extra["store"], _STORE_S), session, RECEIVER)

        def make_lane(connection: socket.socket, inboxes: Inboxes) -> CollectiveLane:
            return CollectiveLane(connection, inboxes, make_pair, layout.block_bytes)

        channel = TcpChannel(source, offer, [lane.connection for lane in lanes], self.timeout_s, make_lane)
        try:
            for lane in channel.lanes:
                assert isinstance(lane, CollectiveLane)
                # Whoever is cancelled here must not cancel what the lane's thread is about to answer.
                await asyncio.shield(asyncio.wrap_future(lane.made))
        except BaseException:
            await channel.close()
            raise
        return channel

    def make_pair(self, store: Any, session: bytes, rank: int) -> PairGroup:
        """Blocking; waits for the other rank. `session` is new with every connection, so no key is ever met twice."""
        return GlooPair(store, session.hex(), rank, self.listen_host, self.timeout_s)

    async def close(self) -> None:
        await super().close()
        self._store = None
