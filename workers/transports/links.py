"""A sender's links to receivers that dialled it: bounded in number, the one that has been quiet for longest makes room. Knows no sockets."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from workers.errors import TransferFailed
from workers.transports.tokens import Peer

MAX_LINKS = 256
QUIET_S = 10.0
"""A link that nothing was sent over for so long counts as idle. A transfer whose prompt takes longer to compute loses its link only
when all others were used since, and then its pieces go by the next transport."""


class Link(Protocol):
    @property
    def is_sending(self) -> bool: ...

    def stop(self) -> None:
        """Ends it at once; may be called twice."""
        ...


AnyLink = TypeVar("AnyLink", bound=Link)


class Links(Generic[AnyLink]):
    """{receiver: link}, the one used longest ago first. Used from one event loop."""

    def __init__(self, max_links: int = MAX_LINKS, quiet_s: float = QUIET_S) -> None:
        self._max_links, self._quiet_s = max_links, quiet_s
        self._links: OrderedDict[Peer, tuple[AnyLink, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[tuple[Peer, AnyLink]]:
        return iter([(peer, link) for peer, (link, _) in self._links.items()])

    def use(self, peer: Peer) -> AnyLink | None:
        """The receiver's link, to send over it now."""
        kept = self._links.get(peer)
        if kept is None:
            return None
        self._links[peer] = kept[0], time.monotonic()
        self._links.move_to_end(peer)
        return kept[0]

    def make_room(self, peer: Peer) -> None:
        """Stops the quietest link if this receiver's would be one too many. Raises TransferFailed when all are in use."""
        if peer in self._links or len(self._links) < self._max_links:
            return
        now = time.monotonic()
        for quiet, (link, used_s) in self._links.items():
            if now - used_s < self._quiet_s:
                break
            if not link.is_sending:
                del self._links[quiet]
                link.stop()
                return
        raise TransferFailed(f"{self._max_links} receivers are connected and in use")

    def put(self, peer: Peer, link: AnyLink) -> AnyLink | None:
        """Returns the link that it replaces."""
        old = self._links.pop(peer, None)
        self._links[peer] = link, time.monotonic()
        return None if old is None else old[0]

    def remove(self, peer: Peer, link: AnyLink) -> None:
        """Unless another has replaced it."""
        kept = self._links.get(peer)
        if kept is not None and kept[0] is link:
            del self._links[peer]
