"""One connection between the leader and a rank: whole messages over TCP, in both directions; knows nothing of their meaning."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from workers.errors import RankLost
from workers.group.message_codec import PREFIX_BYTES, decode, encode, length
from workers.group.messages import BadMessage, Message
from workers.trust.proofs import CHALLENGE_BYTES, PROOF_BYTES, new_challenge, proof, proves


class Channel:
    """Sends from any thread, receives from one. What cannot be sent or understood breaks it, and so does silence.

    `silence_s`: how long either direction may stand still; both ends send signs of life more often than that. The
    kernel keeps this time, so a process that is itself late finds what has arrived meanwhile.
    """

    def __init__(self, connection: socket.socket, silence_s: float) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit = struct.pack("ll", int(silence_s), int(silence_s % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._socket = connection
        self._lock = threading.Lock()
        self._silence_s = silence_s

    @staticmethod
    def connect(host: str, port: int, silence_s: float, token: str) -> Channel:
        """Raises RankLost when nobody answers there who knows the group's token."""
        try:
            channel = Channel(socket.create_connection((host, port), silence_s), silence_s)
        except OSError as error:
            raise RankLost(f"no leader at {host}:{port}: {error}") from error
        secret, own = token.encode(), new_challenge()
        try:
            theirs = channel._read(CHALLENGE_BYTES)
            channel._write(own + proof(secret, "rank", theirs, own))
            if not proves(channel._read(PROOF_BYTES), secret, "leader", theirs, own):
                raise RankLost("its leader is another group's")
        except RankLost as error:
            channel.close()
            raise RankLost(f"{host}:{port} leads no group that this rank was started for: {error}") from error
        return channel

    def admit(self, token: str) -> None:
        """As the leader, before any message. Raises RankLost, with the connection closed, unless a rank of the group has dialled."""
        secret, own = token.encode(), new_challenge()
        self._write(own)
        theirs, shown = self._read(CHALLENGE_BYTES), self._read(PROOF_BYTES)
        if not proves(shown, secret, "rank", own, theirs):
            self.close()
            raise RankLost("it was started for another group")
        self._write(proof(secret, "leader", own, theirs))

    @property
    def own_host(self) -> str:
        """The address by which the other end reaches this host."""
        name: str = self._socket.getsockname()[0]
        return name

    def send(self, message: Message) -> None:
        """Raises RankLost when the connection is broken, or its reader took nothing for `silence_s`."""
        self._write(encode(message))

    def receive(self) -> Message:
        """The next message. Raises RankLost after a silence, or at the end of the connection."""
        try:
            return decode(self._read(length(self._read(PREFIX_BYTES))))
        except BadMessage as error:
            self.close()
            raise RankLost(str(error)) from error

    def close(self) -> None:
        """Ends both directions at once; safe to call twice and from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self, data: bytes) -> None:
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError as error:
            self.close()
            raise RankLost(f"the connection broke: {error}") from error

    def _read(self, count: int) -> bytes:
        data = bytearray()
        try:
            while len(data) < count:
                chunk = self._socket.recv(min(count - len(data), 1 << 20))
                if not chunk:
                    raise RankLost("its connection was closed")
                data += chunk
        except BlockingIOError:
            raise RankLost(f"no sign of life for {self._silence_s} s") from None
        except OSError as error:
            raise RankLost(f"its connection broke: {error}") from error
        return bytes(data)
