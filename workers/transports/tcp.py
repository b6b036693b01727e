"""KV over TCP sockets of its own, straight out of the sender's pool and into the receiver's. What a frame says is in frames.py."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
from collections.abc import Callable, Sequence

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout
from workers.status import WorkerAddress
from workers.transports.channels import Channels, SenderLinks
from workers.transports.contract import OutgoingPiece, View
from workers.transports.offers import TOKEN_BYTES, Peer, Tokens, decode, decode_hex, encode, peer_of
from workers.transports.push import Inboxes, PushInbox
from workers.transports.tcp_lanes import IncomingLane, OutgoingLink, prepare

log = logging.getLogger(__name__)

LANES = 1
"""Connections for each pair of workers and direction."""
_MAX_HANDSHAKES = 64
_HANDSHAKE_S = 5.0
_HELLO = struct.Struct("<4s16s8sBB")
_MAGIC = b"BTNh"


class TcpChannel:
    """The receiver's end of the lanes to one sender."""

    def __init__(
        self,
        source: WorkerAddress,
        offer: bytes,
        lanes: list[socket.socket],
        timeout_s: float,
        make_lane: Callable[[socket.socket, Inboxes], IncomingLane] = IncomingLane,
    ) -> None:
        self.source, self.offer = source, offer
        self.inboxes = Inboxes(self._abort, timeout_s)
        self.lanes = [make_lane(lane, self.inboxes) for lane in lanes]
        for lane in self.lanes:
            lane.start()

    @property
    def is_broken(self) -> bool:
        return self.inboxes.is_broken

    @property
    def is_idle(self) -> bool:
        return self.inboxes.is_idle

    def inbox(self, transfer_id: str, place: Callable[[int], View]) -> PushInbox:
        return self.inboxes.open(transfer_id, place)

    async def close(self) -> None:
        self._abort()
        for lane in self.lanes:
            await asyncio.to_thread(lane.join)

    def _abort(self) -> None:
        self.inboxes.give_up()
        for lane in self.lanes:
            lane.stop()


class TcpTransport:
    """Listens on a port of its own once something is offered; a receiver shows the token of its offer to be let in."""

    name = "tcp"
    extra_fields: tuple[tuple[str, type[int]], ...] = ()

    def __init__(
        self, listen_host: str, timeout_s: float, num_lanes: int = LANES, links: SenderLinks[OutgoingLink] | None = None
    ) -> None:
        self.listen_host = listen_host
        self.timeout_s = timeout_s
        self._num_lanes = num_lanes
        self._tokens = Tokens()
        self._proof = secrets.token_bytes(TOKEN_BYTES)
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._arriving: dict[bytes, dict[int, socket.socket]] = {}
        self._links: SenderLinks[OutgoingLink] = links or SenderLinks()
        self._channels: Channels[TcpChannel] = Channels()
        self._is_closed = False

    # ---- as the sender ----

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        if self._is_closed:
            return None
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self.listen_host else socket.AF_INET
            try:
                self._listener = socket.create_server((self.listen_host, 0), family=family, backlog=128)
            except OSError as error:
                log.warning("tcp is not offered: cannot listen on %s: %s", self.listen_host, error)
                return None
            self._listener.setblocking(False)
            self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener))
        token = self._tokens.give(target)
        port = self._listener.getsockname()[1]
        fields = {"port": port, "lanes": self._num_lanes, "token": token.hex(), "proof": self._proof.hex()}
        try:
            return encode(fields | self.extra_offer())
        except TransferFailed as error:
            log.warning("%s is not offered: %s", self.name, error)
            return None

    def extra_offer(self) -> dict[str, int]:
        """`extra_fields` of an offer. Raises TransferFailed when there can be none."""
        return {}

    def make_link(self, lanes: list[socket.socket], session: bytes) -> OutgoingLink:
        return OutgoingLink(lanes, self.timeout_s)

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        link = self._links.use(peer_of(target))
        if link is None or link.is_broken:
            raise TransferFailed(f"{target.worker_id} is not connected over tcp")
        await link.send(transfer_id, pieces)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, mostly
                log.warning("cannot accept a KV connection: %s", error)
                await asyncio.sleep(1.0)
                continue
            if len(self._handshakes) >= _MAX_HANDSHAKES:
                accepted.close()
                continue
            task = loop.create_task(self._greet(accepted))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _greet(self, accepted: socket.socket) -> None:
        """Lets a receiver in; once all its lanes are there it can be sent to."""
        loop = asyncio.get_running_loop()
        session = b""
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                accepted.setblocking(False)
                magic, token, session, lane, num_lanes = _HELLO.unpack(await _read(accepted, _HELLO.size))
                peer = self._tokens.owner(token)
                if magic != _MAGIC or peer is None or num_lanes != self._num_lanes or lane >= num_lanes:
                    raise TransferFailed("a stranger connected")
                lanes = self._arriving.setdefault(session, {})
                if len(self._arriving) > _MAX_HANDSHAKES:
                    for held in self._arriving.pop(next(iter(self._arriving))).values():
                        held.close()
                lanes[lane] = accepted
                if len(lanes) == num_lanes:
                    self._links.make_room(peer)
                    del self._arriving[session]
                    self._replace_link(peer, self.make_link([lanes[n] for n in range(num_lanes)], session))
                await loop.sock_sendall(accepted, self._proof)
        except (OSError, TimeoutError, TransferFailed, struct.error) as error:
            log.warning("a KV connection was refused: %s", error)
            for held in self._arriving.pop(session, {}).values():
                held.close()
            accepted.close()

    def _replace_link(self, peer: Peer, link: OutgoingLink) -> None:
        old = self._links.put(peer, link)
        if old is not None:
            old.stop()
        link.watch(lambda: self._drop_link(peer, link))

    def _drop_link(self, peer: Peer, link: OutgoingLink) -> None:
        self._links.remove(peer, link)
        link.stop()

    # ---- as the receiver ----

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> TcpChannel:
        fields = decode(offer, {"port": int, "lanes": int, "token": str, "proof": str, **dict(self.extra_fields)})
        token, proof = decode_hex(fields["token"], TOKEN_BYTES), decode_hex(fields["proof"], TOKEN_BYTES)
        port, num_lanes = int(fields["port"]), int(fields["lanes"])
        if not (0 < port < 1 << 16 and 0 < num_lanes <= 16):
            raise TransferFailed("an offer names no sensible port or number of lanes")
        extra = {name: int(fields[name]) for name, _ in self.extra_fields}

        async def make() -> TcpChannel:
            session = secrets.token_bytes(8)
            lanes = await self._dial_lanes(source, port, num_lanes, token, proof, session)
            return await self.make_channel(source, layout, offer, lanes, session, extra)

        return await self._channels.get(source, offer, make)

    async def _dial_lanes(
        self, source: WorkerAddress, port: int, num_lanes: int, token: bytes, proof: bytes, session: bytes
    ) -> list[socket.socket]:
        """Raises TransferFailed."""
        host = source.target.rpartition(":")[0].strip("[]")
        lanes: list[socket.socket] = []
        try:
            async with asyncio.timeout(min(_HANDSHAKE_S, self.timeout_s)):
                for lane in range(num_lanes):
                    hello = _HELLO.pack(_MAGIC, token, session, lane, num_lanes)
                    lanes.append(await _dial(host, port, hello, proof))
        except (OSError, TimeoutError, TransferFailed) as error:
            for opened in lanes:
                opened.close()
            raise TransferFailed(f"no tcp connection to {source.worker_id}: {error or 'no answer'}") from error
        return lanes

    async def make_channel(
        self,
        source: WorkerAddress,
        layout: KvLayout,
        offer: bytes,
        lanes: list[socket.socket],
        session: bytes,
        extra: dict[str, int],
    ) -> TcpChannel:
        """Takes the lanes over. Raises TransferFailed."""
        return TcpChannel(source, offer, lanes, self.timeout_s)

    # ---- both ----

    async def forget(self, worker_id: str) -> None:
        self._tokens.forget(worker_id)
        for peer, link in self._links:
            if peer[0] == worker_id:
                self._drop_link(peer, link)
        await self._channels.forget(worker_id)

    async def close(self) -> None:
        self._is_closed = True
        tasks = [task for task in (self._accepting, *self._handshakes) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._accepting = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for held in (lane for lanes in self._arriving.values() for lane in lanes.values()):
            held.close()
        self._arriving.clear()
        for peer, link in self._links:
            self._drop_link(peer, link)
            await link.join()
        await self._channels.close()


async def _read(connection: socket.socket, num_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < num_bytes:
        some = await loop.sock_recv(connection, num_bytes - len(received))
        if not some:
            raise TransferFailed("the other side hung up")
        received += some
    return received


async def _dial(host: str, port: int, hello: bytes, proof: bytes) -> socket.socket:
    """A connection whose other end has taken our token and shown that it is the one that made the offer."""
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        prepare(connection)
        await loop.sock_connect(connection, address)
        await loop.sock_sendall(connection, hello)
        if not secrets.compare_digest(await _read(connection, len(proof)), proof):
            raise TransferFailed("somebody else listens there")
    except BaseException:
        with contextlib.suppress(OSError):
            connection.close()
        raise
    return connection
