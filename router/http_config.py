"""The bounds of one router's HTTP connections: what a client may send, how long it may take, and how many there may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from workers.bounds import Count, Seconds


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Kept for every connection, before any key is looked at. Bodies have their own bounds in router.api."""

    max_connections: Count = 8192
    """Open at once; a further one is told 503 and closed."""
    max_header_bytes: Annotated[int, Ge(4096)] = 64 << 10
    """Of a request's line and headers together; a larger head is refused with 431."""
    max_headers: Annotated[int, Ge(16)] = 128
    """Headers of one request; more are refused with 431."""
    max_pipelined: Count = 16
    """Requests that a connection may have sent ahead of the one that is answered; with more it is closed."""
    header_timeout_s: Seconds = 10.0
    """From a connection's first byte, or its opening, until a request's headers are there; then 408."""
    body_timeout_s: Seconds = 60.0
    """From its headers until the whole body is there; then 408."""
    write_timeout_s: Seconds = 30.0
    """How long a client may take to read what waits for it before its connection is cut: 64 KiB wait at most."""
