"""A TCP connection with a hand on it: passes bytes on, and can cut, black-hole or throttle. Knows nothing of what they mean."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable

CHUNK_BYTES = 64 << 10
_RESET = struct.pack("ii", 1, 0)


class Line:
    """One connection: what comes from `near` goes to `far` and back, until one end closes; then the other is reset."""

    def __init__(self, near: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._near = near
        self._far: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._opened = asyncio.Event()
        self._opened.set()
        self._bytes_per_s = 0.0
        self._slow_until_s = 0.0
        self.is_closed = False

    async def run(self, host: str, port: int, on_dialled: Callable[[int], None] | None = None) -> None:
        """Dials and passes on until the end. `on_dialled(local port)` is called once connected."""
        tasks: list[asyncio.Task[None]] = []
        try:
            self._far = await asyncio.open_connection(host, port)
            if on_dialled is not None:
                on_dialled(self._far[1].get_extra_info("sockname")[1])
            tasks = [
                asyncio.create_task(self._pump(self._near[0], self._far[1])),
                asyncio.create_task(self._pump(self._far[0], self._near[1])),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            self.cut()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Resets both ends; again for an end that was being dialled the first time."""
        self.is_closed = True
        self._opened.set()
        for end in (self._near, self._far):
            if end is not None:
                sock = end[1].get_extra_info("socket")
                with contextlib.suppress(OSError, AttributeError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end[1].transport.abort()

    def black_hole(self) -> None:
        """From now on nothing gets through, not even that an end has closed."""
        self._opened.clear()

    def throttle(self, bytes_per_s: float, duration_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._slow_until_s = asyncio.get_running_loop().time() + duration_s

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while not self.is_closed:
                slow = loop.time() < self._slow_until_s
                data = await reader.read(512 if slow else CHUNK_BYTES)
                await self._opened.wait()
                if not data or self.is_closed:
                    return
                if slow:
                    await asyncio.sleep(len(data) / self._bytes_per_s)
                writer.write(data)
                await writer.drain()


async def listen(on_line: Callable[[Line], Awaitable[None]], host: str = "127.0.0.1") -> tuple[asyncio.Server, int]:
    """Accepts connections on a free port; each becomes a Line that `on_line` is to run."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await on_line(Line((reader, writer)))

    server = await asyncio.start_server(accept, host, 0)
    return server, server.sockets[0].getsockname()[1]
