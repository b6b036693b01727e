"""Lets ranks in at the group's leader: accepts connections, has each prove that it is of the group, and hears who it is. Knows no epoch."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from workers.config import ParallelConfig
from workers.errors import InvalidConfig, RankLost
from workers.group.channel import Channel
from workers.group.messages import Declined, Hello, Message

log = logging.getLogger(__name__)

MAX_GREETINGS = 64
"""Connections that have not shown yet that they are of the group."""


class Entrance:
    """`serve(hello, channel)` has the connection from then on; each has a thread of its own for that."""

    def __init__(self, parallel: ParallelConfig, token: str, serve: Callable[[Hello, Channel], None]) -> None:
        self._parallel, self._token = parallel, token
        self._serve = serve
        self._greeting = threading.Semaphore(MAX_GREETINGS)
        self._listener: socket.socket | None = None

    def open(self, host: str, port: int) -> tuple[str, int]:
        """Listens for ranks; returns the address. Raises InvalidConfig when it is taken."""
        try:
            self._listener = socket.create_server((host, port))
        except OSError as error:
            raise InvalidConfig(f"the group's leader cannot listen at {host}:{port}: {error}") from error
        threading.Thread(target=self._accept, args=(self._listener,), name="group-accept", daemon=True).start()
        name: tuple[str, int] = self._listener.getsockname()[:2]
        return name

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if not self._greeting.acquire(blocking=False):
                connection.close()
                continue
            channel = Channel(connection, self._parallel.heartbeat_timeout_s)
            threading.Thread(target=self._greet, args=(channel,), name="group-rank", daemon=True).start()

    def _greet(self, channel: Channel) -> None:
        try:
            channel.admit(self._token)
            hello = channel.receive()
        except RankLost as error:
            log.warning("a connection to the group's leader was refused: %s", error)
            channel.close()
            return
        finally:
            self._greeting.release()
        refusal = self._refusal(hello)
        if isinstance(hello, Hello) and not refusal:
            self._serve(hello, channel)
            return
        log.warning("a rank was declined: %s", refusal)
        tell(channel, Declined(refusal))
        channel.close()

    def _refusal(self, hello: Message) -> str:
        if not isinstance(hello, Hello):
            return "a rank begins with Hello"
        if hello.size != self._parallel.size or not 1 <= hello.rank < hello.size:
            return f"rank {hello.rank} of {hello.size} does not belong to a group of {self._parallel.size}"
        return ""


def tell(channel: Channel, message: Message) -> None:
    """A rank that cannot be reached is noticed by its receiving thread."""
    try:
        channel.send(message)
    except RankLost:
        log.debug("a message to a lost rank was dropped")
