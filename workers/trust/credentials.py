"""A process's own certificate and key, read from files again when those are replaced, as gRPC takes them."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import grpc

from workers.errors import InvalidConfig
from workers.trust.config import TlsConfig
from workers.trust.parties import Party

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20


class Credentials:
    """Raises InvalidConfig when the files cannot be read. Later, files that cannot be read leave what was read before in force.

    gRPC asks for the server's at every handshake, on a thread of its own.
    """

    def __init__(self, tls: TlsConfig, party: Party) -> None:
        self.party = party
        self._paths = tls.files_of(party)
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self._cert, self._key, self._ca = (_read(path, party) for path in self._paths)
        self._number = 1
        """Of the files in force; those that the server and the channels have been given are kept beside it."""
        self._server_number = 1
        self._channel: tuple[int, Any] = (0, None)

    def server(self) -> Any:
        """grpc.ServerCredentials that demand a certificate of every client."""
        return grpc.dynamic_ssl_server_credentials(self._configuration(), self._fetch, True)

    def channel(self) -> Any:
        """grpc.ChannelCredentials for a channel that is opened now."""
        with self._lock:
            self._refresh()
            if self._channel[0] != self._number:
                self._channel = self._number, grpc.ssl_channel_credentials(self._ca, self._key, self._cert)
            return self._channel[1]

    def _configuration(self) -> Any:
        return grpc.ssl_server_certificate_configuration([(self._key, self._cert)], self._ca)

    def _fetch(self) -> Any:
        """None: as before."""
        with self._lock:
            self._refresh()
            if self._server_number == self._number:
                return None
            self._server_number = self._number
            return self._configuration()

    def _refresh(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        try:
            read = [_read(path, self.party) for path in self._paths]
        except InvalidConfig as error:
            log.warning("new certificates are not used: %s", error)
            return
        self._stamp = stamp
        if read != [self._cert, self._key, self._ca]:
            self._cert, self._key, self._ca = read
            self._number += 1
            log.info("%s uses new certificates", self.party.file_name)

    def _stamp_now(self) -> tuple[tuple[int, int, int], ...]:
        """Changes when a file is written or replaced, also by another link, as Kubernetes does with Secrets."""
        return tuple(_stamp(path) for path in self._paths)


def credentials_of(tls: TlsConfig, party: Party) -> Credentials | None:
    """None where the cluster goes without certificates. Raises InvalidConfig."""
    if tls.mode != "on":
        return None
    if not tls.has_files:
        raise InvalidConfig(
            f"{party.file_name} has no certificate: make one with `baton tls init`, and name its files in tls.cert, tls.key and tls.ca"
        )
    return Credentials(tls, party)


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _read(path: str, party: Party) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidConfig(f"{party.file_name} cannot read {Path(path)}: {error.strerror}") from error
    if not content.startswith(b"-----BEGIN") or len(content) > MAX_FILE_BYTES:
        raise InvalidConfig(f"{path} holds no certificate or key in PEM")
    return content
