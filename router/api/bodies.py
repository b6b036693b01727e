"""Reads the bodies of requests, each within its bound and all of them within one; knows nothing of what they say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request as HttpRequest

from router.api.middleware import too_large
from router.config import ApiConfig
from workers.errors import Refusal, Refused
from workers.machine.pressure import MemoryWatch

SMALL_BYTES = 64 << 10
"""So much of each body is not counted, so that large ones that are slow to come keep nobody else out."""


class OpenBodies:
    """The bodies that are being received, or wait to be read. Used by one event loop."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._memory = MemoryWatch("large requests are refused", config.min_free_bytes)
        self.num_bytes = 0

    @asynccontextmanager
    async def receive(self, http: HttpRequest) -> AsyncIterator[bytes]:
        """The whole body, which counts until the context ends. Raises Rejected (too large), Refused (too many), ClientDisconnect."""
        received = bytearray()
        counted = 0
        try:
            async for part in http.stream():
                received += part
                if len(received) > self._config.max_body_bytes:
                    raise too_large(self._config)
                more = max(0, len(received) - SMALL_BYTES) - counted
                if more and self._memory.is_short:
                    raise Refused(Refusal.QUEUE_FULL, "this host has too little memory for a request of this size", 1.0)
                if more and self.num_bytes + more > self._config.max_open_body_bytes:
                    raise Refused(Refusal.QUEUE_FULL, "too many large requests are being received", retry_after_s=1.0)
                self.num_bytes += more
                counted += more
            yield bytes(received)
        finally:
            self.num_bytes -= counted
