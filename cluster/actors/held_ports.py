"""Keeps routers' ports open while their processes are replaced: who connects meanwhile waits for the next process, and is not refused.

The process that keeps the cluster binds each port and holds the socket; routers of this host fetch it, by their names, over a
socket in the cluster's folder, which only this user can enter. A router that dies takes its connections with it, but not the
port's queue of new ones.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

from router.listening import bind
from workers.errors import BatonError

_MAX_NAME = 200
_TIMEOUT_S = 5.0


class PortNotHeld(BatonError):
    """Nobody holds a port under this name."""


class PortHolder:
    """Owns the sockets from `hold` to `close`; a thread hands them out."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/ports"
        self._sockets: dict[str, socket.socket] = {}
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(self.path)
        self._door.listen(64)
        threading.Thread(target=self._hand_out, name="held-ports", daemon=True).start()

    def hold(self, name: str, host: str, port: int) -> None:
        """Listens there for the router called `name`. Raises InvalidConfig when that cannot be."""
        self._sockets[name] = bind(host, port)

    def close(self) -> None:
        """From here on a port is open only for as long as its router lives."""
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._door.close()
        for held in self._sockets.values():
            held.close()
        self._sockets = {}

    def _hand_out(self) -> None:
        while True:
            try:
                visitor, _ = self._door.accept()
            except OSError:
                return
            with visitor, suppress(OSError):
                visitor.settimeout(_TIMEOUT_S)
                held = self._sockets.get(visitor.recv(_MAX_NAME).decode(errors="replace"))
                socket.send_fds(visitor, [b"1" if held else b"0"], [held.fileno()] if held else [])


def fetch(path: str, name: str) -> socket.socket:
    """The listening socket that is held under this name; blocks for a moment. Raises PortNotHeld."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
            visitor.settimeout(_TIMEOUT_S)
            visitor.connect(path)
            visitor.sendall(name.encode())
            _, descriptors, _, _ = socket.recv_fds(visitor, 1, 1)
    except OSError as error:
        raise PortNotHeld(f"the process that keeps this cluster does not hand out its ports: {error}") from error
    if not descriptors:
        raise PortNotHeld(f"no port is held for {name}")
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptors[0])
