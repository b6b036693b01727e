"""Moves frames over connected sockets on helper threads; each system call moves a whole piece without the interpreter's lock. Knows no handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Sequence

from workers.errors import TransferFailed
from workers.kv_memory.checksum import checksums
from workers.machine.threads import started_threads
from workers.transports.contract import OutgoingPiece
from workers.transports.push import HEADER_BYTES, Frame, Inboxes, pack, transfer_key, unpack

_SCRATCH_BYTES = 256 << 10
_BUFFERS_PER_CALL = 64
"""Headers and pieces that one call hands to the kernel."""
INLINE_BYTES = 64 << 10
"""Up to this many bytes are tried on the event loop first."""

Buffer = memoryview


def prepare(connection: socket.socket) -> None:
    """Settings of both ends. The kernel sizes the buffers itself."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class OutgoingLink:
    """The sender's end of the lanes to one receiver. Belongs to the event loop."""

    def __init__(self, lanes: list[socket.socket], timeout_s: float) -> None:
        self.lanes = lanes
        self._free: asyncio.Queue[socket.socket] = asyncio.Queue()
        self.helpers = started_threads(len(lanes), "kv-tcp-send")
        self._loop = asyncio.get_running_loop()
        self._running: set[asyncio.Future[None]] = set()
        self._watched = False
        self.is_broken = False
        seconds, fraction = divmod(timeout_s, 1)
        for lane in lanes:
            prepare(lane)
            lane.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(fraction * 1e6))
            )
            self._free.put_nowait(lane)

    def watch(self, on_gone: Callable[[], None]) -> None:
        """A receiver sends nothing, so a readable lane means that it is gone."""
        self._watched = True
        for lane in self.lanes:
            self._loop.add_reader(lane.fileno(), on_gone)

    async def send(self, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        """Raises TransferFailed. Returns, or raises, when no view is read any more."""
        key = transfer_key(transfer_id)
        shares: list[list[Buffer]] = [[] for _ in self.lanes]
        loads = [0] * len(shares)
        for piece in pieces:
            lightest = loads.index(min(loads))
            loads[lightest] += piece.view.nbytes
            header = pack(Frame(key, piece.piece, 0, piece.view.nbytes, piece.view.nbytes))
            shares[lightest] += [memoryview(header), piece.view.data]
        results = await asyncio.gather(
            *(self._send_share(share, load) for share, load in zip(shares, loads, strict=True) if share),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _send_share(self, buffers: list[Buffer], num_bytes: int) -> None:
        lane = await self._free.get()
        try:
            if self.is_broken:
                raise TransferFailed("the receiver is gone")
            await self.write(lane, buffers, num_bytes)
        except OSError as error:
            self.stop()
            raise TransferFailed(f"a tcp connection broke: {error}") from error
        finally:
            self._free.put_nowait(lane)

    async def write(self, lane: socket.socket, buffers: list[Buffer], num_bytes: int) -> None:
        """Has all buffers, headers and pieces, sent in this order. Raises OSError."""
        if num_bytes <= INLINE_BYTES:
            buffers = send_some(lane, buffers)
        if buffers:
            await outlast(self.run(send_all, lane, buffers))

    @property
    def is_sending(self) -> bool:
        return self._free.qsize() < len(self.lanes)

    def run(self, work: Callable[..., None], *arguments: object) -> asyncio.Future[None]:
        """Starts it on a helper thread; the lanes stay open until it has ended."""
        running: asyncio.Future[None] = self._loop.run_in_executor(self.helpers, work, *arguments)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return running

    def stop(self) -> None:
        """Ends all lanes at once; whoever is sending fails."""
        if self.is_broken:
            return
        self.is_broken = True
        for lane in self.lanes:
            if self._watched:
                self._loop.remove_reader(lane.fileno())
            with contextlib.suppress(OSError):
                lane.shutdown(socket.SHUT_RDWR)
        self.helpers.shutdown(wait=False)
        if self._running:
            asyncio.gather(*self._running, return_exceptions=True).add_done_callback(lambda _: self._close_lanes())
        else:
            self._close_lanes()

    async def join(self) -> None:
        """After `stop`: returns when no thread is left."""
        while self._running:
            await asyncio.wait(tuple(self._running))
        await asyncio.to_thread(self.helpers.shutdown)

    def _close_lanes(self) -> None:
        for lane in self.lanes:
            lane.close()


async def outlast(running: asyncio.Future[None]) -> None:
    """Waits for it even when cancelled: a thread still reads the views."""
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def send_some(lane: socket.socket, buffers: list[Buffer]) -> list[Buffer]:
    """What is left after the socket has taken what it can at once."""
    try:
        return _rest(buffers, lane.sendmsg(buffers[:_BUFFERS_PER_CALL], (), socket.MSG_DONTWAIT))
    except BlockingIOError:
        return buffers


def send_all(lane: socket.socket, buffers: list[Buffer]) -> None:
    lane.setblocking(True)
    while buffers:
        sent = lane.sendmsg(buffers[:_BUFFERS_PER_CALL])
        buffers = _rest(buffers, sent)


def _rest(buffers: list[Buffer], sent: int) -> list[Buffer]:
    for index, buffer in enumerate(buffers):
        if sent < buffer.nbytes:
            return [buffer[sent:], *buffers[index + 1 :]]
        sent -= buffer.nbytes
    return []


class IncomingLane:
    """Reads one connection on a thread of its own until it ends; pieces go straight to where their inbox wants them."""

    def __init__(self, connection: socket.socket, inboxes: Inboxes) -> None:
        connection.setblocking(True)
        self.inboxes = inboxes
        self._connection = connection
        self._thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wakes the thread, which then ends."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self.serve()
        except (OSError, TransferFailed):
            pass  # whoever waits hears it from the inboxes
        finally:
            self.inboxes.abort()
            self._connection.close()

    def serve(self) -> None:
        """Reads until the sender hangs up. Raises OSError or TransferFailed when the connection breaks."""
        header = bytearray(HEADER_BYTES)
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while self.read(memoryview(header)):
            frame = unpack(header)
            inbox = self.inboxes.find(frame.key)
            home = None if inbox is None else inbox.begin(frame)
            if inbox is None or home is None:
                self._skip(frame.length, scratch)
                continue
            is_good, checksum = False, None
            try:
                is_good = self.read(home.data)
                if is_good and frame.length == frame.total and not self.inboxes.is_authenticated:
                    (checksum,) = checksums([home])  # now, while the piece is in this core's cache
            finally:
                inbox.end(frame, is_good, checksum)

    def read(self, buffer: Buffer) -> bool:
        """Fills the buffer; False when the other side has hung up."""
        while buffer.nbytes:
            received = self._connection.recv_into(buffer, buffer.nbytes, socket.MSG_WAITALL)
            if not received:
                return False
            buffer = buffer[received:]
        return True

    def _skip(self, num_bytes: int, scratch: Buffer) -> None:
        while num_bytes:
            part = scratch[: min(num_bytes, scratch.nbytes)]
            if not self.read(part):
                raise TransferFailed("the sender hung up")
            num_bytes -= part.nbytes
