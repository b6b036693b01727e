"""The certificate that HTTPS is served with; read again when its files change, so that no connection is cut for a new one."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from workers.errors import InvalidConfig

LOOK_S = 10.0
"""Between two looks at the files."""
_log = logging.getLogger(__name__)


class Certificate:
    """`context` serves the newest certificate that could be read; connections that are open keep theirs."""

    def __init__(self, cert_file: str, key_file: str = "") -> None:
        """Raises InvalidConfig when the files are no certificate and its key."""
        self._files = (cert_file, key_file or cert_file)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._seen = self._stamps()
        self._load(self.context)

    def refresh(self) -> bool:
        """Looks at the files, and takes what they hold now if they have changed and fit together. True: it was taken."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a pair of which half is new yet would spoil ours
            self._load(self.context)
        except InvalidConfig as error:
            _log.warning("HTTPS goes on with the certificate it has: %s", error)
            return False
        return True

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.refresh)

    def _stamps(self) -> list[tuple[int, int]]:
        stamps = []
        for name in self._files:
            try:
                found = Path(name).stat()
                stamps.append((found.st_mtime_ns, found.st_ino))
            except OSError:
                stamps.append((0, 0))
        return stamps

    def _load(self, context: ssl.SSLContext) -> None:
        cert_file, key_file = self._files
        try:
            context.load_cert_chain(cert_file, key_file, password=_no_password)
        except (OSError, ValueError) as error:
            raise InvalidConfig(
                f"router.cert_file {cert_file!r} and its key in {key_file!r} cannot be used: {error}"
            ) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted: give one without a password, in a file that this user alone can read")
