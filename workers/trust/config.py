"""Settings of the certificates that a cluster's processes show each other; reads no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.errors import InvalidConfig
from workers.trust.parties import Party

NAME = "{name}"
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Certificates between routers and workers. Give all three files, or none. Files may be replaced while processes run.

    `{name}` in a path stands for the process: worker.decode-3, router.router-0.
    """

    mode: Literal["on", "off", "insecure"] = "on"
    """on: every connection between routers and workers is encrypted, and both ends show a certificate; off: none are, which only workers on a loopback address are started with; insecure: none are, on any address."""
    cert: str = ""
    """PEM file with the process's certificate, and those between it and the authority's. Empty: `baton serve` makes certificates for all that it starts."""
    key: str = ""
    """PEM file with its private key."""
    ca: str = ""
    """PEM file with the certificates of the authorities that are believed: several while one takes over from another."""

    def __post_init__(self) -> None:
        given = [bool(path) for path in (self.cert, self.key, self.ca)]
        if any(given) and not all(given):
            raise InvalidConfig("tls.cert, tls.key and tls.ca go together: give all three, or none")
        if any(given) and self.mode != "on":
            raise InvalidConfig(f"tls.mode must be on where tls.cert is given; it is {self.mode!r}")

    @property
    def has_files(self) -> bool:
        return bool(self.cert)

    def check_host(self, host: str) -> None:
        """Raises InvalidConfig when workers at that address may not go without certificates."""
        if self.mode == "off" and host not in LOOPBACK_HOSTS:
            raise InvalidConfig(
                f"tls.mode=off lets whoever reaches {host} read and forge what workers say: leave it on, "
                "or say tls.mode=insecure where nobody else can reach that network"
            )

    def files_of(self, party: Party) -> tuple[str, str, str]:
        """Paths of a process's certificate, key and authorities."""
        cert, key, ca = (path.replace(NAME, party.file_name) for path in (self.cert, self.key, self.ca))
        return cert, key, ca
