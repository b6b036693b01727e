"""Lanes of a KV connection whose bytes travel sealed: what is sealed, and when, around the loops of tcp_lanes.py. Knows no handshakes."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from workers.transports.push import HEADER_BYTES, Inboxes
from workers.transports.sealing import SEGMENT_BYTES, TAG_BYTES, Seal, segments
from workers.transports.tcp_lanes import INLINE_BYTES, Buffer, IncomingLane, OutgoingLink, outlast, send_all, send_some


class SealedLink(OutgoingLink):
    """The sender's end. Each byte is read from the pool once, sealed into a buffer that stays in the cache, and sent from there."""

    def __init__(self, lanes: list[socket.socket], timeout_s: float, seals: Sequence[Seal]) -> None:
        super().__init__(lanes, timeout_s)
        self._seals = dict(zip(lanes, seals, strict=True))

    async def write(self, lane: socket.socket, buffers: list[Buffer], num_bytes: int) -> None:
        seal = self._seals[lane]
        if num_bytes > INLINE_BYTES:
            await outlast(self.run(_send_sealed, lane, seal, buffers))
            return
        rest = send_some(lane, [memoryview(bytes(part)) for part in _sealed(seal, buffers)])
        if rest:
            await outlast(self.run(send_all, lane, rest))


class SealedLane(IncomingLane):
    """The receiver's end. A piece is in its place once all of it has opened; one that does not open ends the lane."""

    def __init__(self, connection: socket.socket, inboxes: Inboxes, seal: Seal) -> None:
        super().__init__(connection, inboxes)
        self._seal = seal
        self._buffer = memoryview(bytearray(SEGMENT_BYTES + TAG_BYTES))

    def read(self, buffer: Buffer) -> bool:
        for segment in segments(buffer):
            sealed = self._buffer[: segment.nbytes + TAG_BYTES]
            if not super().read(sealed):
                return False
            self._seal.open(sealed, segment)
        return True


def _send_sealed(lane: socket.socket, seal: Seal, buffers: list[Buffer]) -> None:
    """With each header waits what it announces, so that the receiver wakes once for both."""
    lane.setblocking(True)
    for part in _sealed(seal, buffers):
        lane.sendall(part, socket.MSG_MORE if part.nbytes <= HEADER_BYTES + TAG_BYTES else 0)


def _sealed(seal: Seal, buffers: list[Buffer]) -> Iterator[Buffer]:
    """Each is valid until the next one is asked for."""
    scratch = memoryview(bytearray(SEGMENT_BYTES + TAG_BYTES))
    for buffer in buffers:
        for segment in segments(buffer):
            sealed = scratch[: segment.nbytes + TAG_BYTES]
            seal.close(segment, sealed)
            yield sealed
