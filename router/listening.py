"""Sockets that a router listens on: a TCP port, which others may share, and a Unix socket beside it."""

from __future__ import annotations

import os
import socket
import stat

from workers.errors import InvalidConfig


def bind(host: str, port: int, share_port: bool = False) -> socket.socket:
    """A listening socket whose connections send at once (TCP_NODELAY is inherited). `share_port`: others of this user, who say so
    as well, may listen there too; then it does not listen yet, for connections would come. Raises InvalidConfig."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        if not share_port:
            listener.listen(2048)
    except OSError as error:
        listener.close()
        raise InvalidConfig(f"router.port {port} cannot be used on {host}: {error.strerror}; choose another") from error
    return listener


def bind_unix(path: str) -> socket.socket:
    """A Unix socket that whoever may enter its folder can connect to, as every user of this host can to a port of loopback. What
    a router that was killed has left there is removed. Raises InvalidConfig."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_abandoned(path):
            os.unlink(path)
        os.fchmod(listener.fileno(), 0o666)  # not chmod behind bind, when who is not to connect may have done so
        listener.bind(path)
        os.chmod(path, 0o666)  # bind takes off what the umask forbids
    except OSError as error:
        listener.close()
        raise InvalidConfig(f"router.uds {path!r} cannot be used: {error.strerror or error}") from error
    return listener


def _is_abandoned(path: str) -> bool:
    """A socket at which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        try:
            visitor.connect(path)
        except ConnectionRefusedError:
            return True
    return False
