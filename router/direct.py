"""How an answer writes to its connection without a turn through the ASGI layers for each token; knows nothing of what it says."""

from __future__ import annotations

from typing import Protocol

DIRECT = "baton.direct"
"""Name of the ASGI extension under which a connection offers its DirectWriter."""


class DirectWriter(Protocol):
    """Writes parts of a body of unknown length that `http.response.start` has begun and that goes on."""

    @property
    def is_open(self) -> bool:
        """A part can be written now, without waiting."""
        ...

    def write(self, body: bytes) -> None:
        """What `http.response.body` with more to come would do; `body` is not empty."""
        ...
