"""Who a process is: its kind and its id, and the name that stands for both in its certificate. Plain values; reads no certificate."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from workers.errors import InvalidConfig

_DOMAIN = "baton"
_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class Kind(StrEnum):
    """WORKER and ROUTER have ids. OBSERVER reads what a worker says of itself. ADMIN switches roles and drains."""

    WORKER = "worker"
    ROUTER = "router"
    OBSERVER = "observer"
    ADMIN = "admin"

    @property
    def has_id(self) -> bool:
        return self in (Kind.WORKER, Kind.ROUTER)


@dataclass(frozen=True, slots=True)
class Party:
    """One identity; a certificate may carry several, as that of a router that may also administer.

    Raises InvalidConfig for an id that no certificate can carry.
    """

    kind: Kind
    id: str = ""

    def __post_init__(self) -> None:
        if self.kind.has_id and not _ID.fullmatch(self.id):
            raise InvalidConfig(
                f"the id of a {self.kind} takes 1 to 63 letters, digits, '-', '_' and '.', with a letter or digit at "
                f"both ends; it is {self.id!r}"
            )
        if not self.kind.has_id and self.id:
            raise InvalidConfig(f"{self.kind} takes no id; it is {self.id!r}")

    @property
    def dns_name(self) -> str:
        """As in a certificate's alternative names: decode-3.worker.baton, router-0.router.baton, admin.baton."""
        return ".".join((*([self.id] if self.id else []), self.kind.value, _DOMAIN))

    @property
    def file_name(self) -> str:
        """Of its certificate and key, without a suffix: worker.decode-3, router.router-0, admin."""
        return f"{self.kind.value}.{self.id}" if self.id else self.kind.value


def worker(worker_id: str) -> Party:
    return Party(Kind.WORKER, worker_id)


def router(router_id: str) -> Party:
    return Party(Kind.ROUTER, router_id)


OBSERVER = Party(Kind.OBSERVER)
ADMIN = Party(Kind.ADMIN)


def party_called(dns_name: str) -> Party | None:
    """The party of such a name; None: it names none."""
    rest, _, domain = dns_name.rpartition(".")
    own_id, _, kind = rest.rpartition(".")
    if domain != _DOMAIN or kind not in set(Kind):
        return None
    try:
        return Party(Kind(kind), own_id)
    except InvalidConfig:
        return None


def parties_called(dns_names: Iterable[str]) -> frozenset[Party]:
    """Those among the names of a certificate."""
    return frozenset(party for name in dns_names if (party := party_called(name)) is not None)
