"""/health and /ready of a process that has no HTTP API of its own: what Kubernetes asks pods of workers and of Ray.

A thread answers, so that a process whose event loop hangs is found out. It tells nothing else, and takes nothing.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

from workers.errors import InvalidConfig

LIVE_S = 60.0
"""A process whose content has not answered for so long is no longer alive. Ray starts a crashed actor again in less."""
BEAT_S = 5.0
CLIENT_TIMEOUT_S = 5.0


class Probes:
    """What the two paths say. `ready` is set by its owner; `beat` is called as long as the content answers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_beat = clock()
        self.is_ready = False

    def beat(self) -> None:
        self._last_beat = self._clock()

    @property
    def is_alive(self) -> bool:
        return self._clock() - self._last_beat < LIVE_S

    def answer(self, path: str) -> tuple[int, str]:
        """Status and word for a path."""
        if path == "/health":
            return (200, "alive") if self.is_alive else (503, "does not answer")
        if path == "/ready":
            return (200, "ready") if self.is_ready and self.is_alive else (503, "not ready")
        return 404, "try /health or /ready"

    async def watch(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Beats as long as `ask` succeeds. Cancel it."""
        while True:
            with suppress(Exception):
                async with asyncio.timeout(BEAT_S):
                    await ask()
                self.beat()
            await asyncio.sleep(BEAT_S)


class ProbeServer:
    """Serves them on a port until it is closed; port 0 in the constructor: none."""

    def __init__(self, probes: Probes, host: str, port: int) -> None:
        self._server: HTTPServer | None = None
        if not port:
            return
        try:
            self._server = HTTPServer((host, port), _handler(probes))
        except OSError as error:
            raise InvalidConfig(f"--probe-port {port} cannot be used on {host}: {error.strerror}") from error
        threading.Thread(target=self._server.serve_forever, name="probes", daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _handler(probes: Probes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_TIMEOUT_S

        def do_GET(self) -> None:
            status, text = probes.answer(self.path)
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("content-type", "text/plain")
            self.send_header("content-length", str(len(body)))
            with suppress(ConnectionError):  # whoever asked has waited long enough
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds."""

    return Handler
