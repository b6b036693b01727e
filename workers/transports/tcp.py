"""KV over TCP sockets of its own, straight out of the sender's pool and into the receiver's. What a frame says is in frames.py."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout
from workers.status import WorkerAddress
from workers.transports.channels import Channels, SenderLinks
from workers.transports.contract import OutgoingPiece, View
from workers.transports.offers import ID_BYTES, Peer, Token, Tokens, decode, decode_hex, encode, peer_of
from workers.transports.push import Inboxes, PushInbox
from workers.transports.sealed_lanes import SealedLane, SealedLink
from workers.transports.sealing import SECRET_BYTES, Seal, lane_key, session_key
from workers.transports.tcp_lanes import IncomingLane, OutgoingLink, prepare
from workers.trust.proofs import CHALLENGE_BYTES, PROOF_BYTES, new_challenge, proof, proves

log = logging.getLogger(__name__)

LANES = 1
"""Connections for each pair of workers and direction."""
_MAX_HANDSHAKES = 64
_HANDSHAKE_S = 5.0
_MAGIC = b"BTN3"
_CALL = struct.Struct("<4s16s16sBB")
"""Of the receiver: magic, id of the token, challenge, number of the lane and of lanes; its proof follows."""


_FIELDS: dict[str, type[int] | type[str]] = {"port": int, "lanes": int, "token": str, "secret": str, "sealed": int}


@dataclass(frozen=True, slots=True)
class Lane:
    """A connection whose ends know each other, and the key of what is sealed on it."""

    connection: socket.socket
    key: bytes


class TcpChannel:
    """The receiver's end of the lanes to one sender. Raises TransferFailed where the host starts no more threads."""

    def __init__(
        self,
        source: WorkerAddress,
        offer: bytes,
        lanes: list[socket.socket],
        timeout_s: float,
        make_lane: Callable[[socket.socket, Inboxes], IncomingLane] = IncomingLane,
        is_sealed: bool = False,
    ) -> None:
        self.source, self.offer = source, offer
        self.inboxes = Inboxes(self._abort, timeout_s, is_sealed)
        self.lanes = [make_lane(lane, self.inboxes) for lane in lanes]
        for number, lane in enumerate(self.lanes):
            try:
                lane.start()
            except RuntimeError as error:
                for connection in lanes[number:]:
                    connection.close()
                for started in self.lanes[:number]:
                    started.stop()
                raise TransferFailed(f"this host starts no more threads for tcp: {error}") from error

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
    """Listens on a port of its own once something is offered; receiver and sender prove to each other that they know the offer's secret.

    `seals`: what travels is encrypted and authenticated, with keys that only these two ends of this connection have.
    """

    name = "tcp"
    extra_fields: tuple[tuple[str, type[int]], ...] = ()

    def __init__(
        self,
        listen_host: str,
        timeout_s: float,
        num_lanes: int = LANES,
        links: SenderLinks[OutgoingLink] | None = None,
        seals: bool = False,
    ) -> None:
        self.listen_host = listen_host
        self.seals = seals
        self.timeout_s = timeout_s
        self._num_lanes = num_lanes
        self._tokens = Tokens()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._arriving: dict[bytes, dict[int, Lane]] = {}
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
        fields = {
            "port": port,
            "lanes": self._num_lanes,
            "token": token.id.hex(),
            "secret": token.secret.hex(),
            "sealed": int(self.seals),
        }
        try:
            return encode(fields | self.extra_offer())
        except TransferFailed as error:
            log.warning("%s is not offered: %s", self.name, error)
            return None

    def extra_offer(self) -> dict[str, int]:
        """`extra_fields` of an offer. Raises TransferFailed when there can be none."""
        return {}

    def make_link(self, lanes: list[Lane], session: bytes) -> OutgoingLink:
        """`session` is known to both ends alone, and new with every connection."""
        connections = [lane.connection for lane in lanes]
        if self.seals:
            return SealedLink(connections, self.timeout_s, [Seal(lane.key) for lane in lanes])
        return OutgoingLink(connections, self.timeout_s)

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
                challenge = new_challenge()
                await loop.sock_sendall(accepted, challenge)
                call = await _read(accepted, _CALL.size)
                shown = await _read(accepted, PROOF_BYTES)
                magic, token_id, theirs, lane, num_lanes = _CALL.unpack(call)
                owner = self._tokens.called(token_id)
                if magic != _MAGIC or owner is None or num_lanes != self._num_lanes or lane >= num_lanes:
                    raise TransferFailed("a stranger connected")
                peer, token = owner
                if not proves(shown, token.secret, "receiver", challenge, call):
                    raise TransferFailed("somebody connected who does not know the secret of the offer")
                session = session_key(token.secret, theirs)
                lanes = self._arriving.setdefault(session, {})
                if len(self._arriving) > _MAX_HANDSHAKES:
                    for held in self._arriving.pop(next(iter(self._arriving))).values():
                        held.connection.close()
                lanes[lane] = Lane(accepted, lane_key(session, challenge, call))
                if len(lanes) == num_lanes:
                    self._links.make_room(peer)
                    self._replace_link(peer, self.make_link([lanes[n] for n in range(num_lanes)], session))
                    del self._arriving[session]
                await loop.sock_sendall(accepted, proof(token.secret, "sender", challenge, call))
        except (OSError, TimeoutError, TransferFailed, RuntimeError) as error:  # RuntimeError: no more threads
            log.warning("a KV connection was refused: %s", error)
            for held in self._arriving.pop(session, {}).values():
                held.connection.close()
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
        fields = decode(offer, _FIELDS | dict(self.extra_fields))
        token = Token(decode_hex(fields["token"], ID_BYTES), decode_hex(fields["secret"], SECRET_BYTES))
        is_sealed = bool(fields["sealed"])
        if self.seals and not is_sealed:
            raise TransferFailed(f"{source.worker_id} does not encrypt, and worker.kv_encryption is on here")
        port, num_lanes = int(fields["port"]), int(fields["lanes"])
        if not (0 < port < 1 << 16 and 0 < num_lanes <= 16):
            raise TransferFailed("an offer names no sensible port or number of lanes")
        extra = {name: int(fields[name]) for name, _ in self.extra_fields}

        async def make() -> TcpChannel:
            challenge = new_challenge()
            lanes = await self._dial_lanes(source, port, num_lanes, token, challenge)
            session = session_key(token.secret, challenge)
            return await self.make_channel(source, layout, offer, lanes, session, is_sealed, extra)

        return await self._channels.get(source, offer, make)

    async def _dial_lanes(
        self, source: WorkerAddress, port: int, num_lanes: int, token: Token, challenge: bytes
    ) -> list[Lane]:
        """Raises TransferFailed."""
        host = source.target.rpartition(":")[0].strip("[]")
        lanes: list[Lane] = []
        try:
            async with asyncio.timeout(min(_HANDSHAKE_S, self.timeout_s)):
                for lane in range(num_lanes):
                    call = _CALL.pack(_MAGIC, token.id, challenge, lane, num_lanes)
                    lanes.append(await _dial(host, port, call, token, session_key(token.secret, challenge)))
        except (OSError, TimeoutError, TransferFailed) as error:
            for opened in lanes:
                opened.connection.close()
            raise TransferFailed(f"no tcp connection to {source.worker_id}: {error or 'no answer'}") from error
        return lanes

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
        """Takes the lanes over. Raises TransferFailed."""
        seals = {lane.connection: Seal(lane.key) for lane in lanes}

        def make_lane(connection: socket.socket, inboxes: Inboxes) -> IncomingLane:
            return (
                SealedLane(connection, inboxes, seals[connection]) if is_sealed else IncomingLane(connection, inboxes)
            )

        return TcpChannel(source, offer, [lane.connection for lane in lanes], self.timeout_s, make_lane, is_sealed)

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
            held.connection.close()
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


async def _dial(host: str, port: int, call: bytes, token: Token, session: bytes) -> Lane:
    """A connection whose other end has shown, as we have, that it knows the secret of the offer."""
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        prepare(connection)
        await loop.sock_connect(connection, address)
        challenge = await _read(connection, CHALLENGE_BYTES)
        await loop.sock_sendall(connection, call + proof(token.secret, "receiver", challenge, call))
        if not proves(await _read(connection, PROOF_BYTES), token.secret, "sender", challenge, call):
            raise TransferFailed("somebody else listens there")
    except BaseException:
        with contextlib.suppress(OSError):
            connection.close()
        raise
    return Lane(connection, lane_key(session, challenge, call))
