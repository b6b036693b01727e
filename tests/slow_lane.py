"""Stands before a server on loopback: carries what clients say to it, and what it says back after a delay; may be turned to another server."""

from __future__ import annotations

import asyncio
import contextlib


class SlowLane:
    """`delay_s` holds for whatever is read from then on. `turn` breaks the connections that are open."""

    def __init__(self, port: int) -> None:
        self._there = port
        self.delay_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """The port on which it listens."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def turn(self, port: int) -> None:
        self._there = port
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        self._server.close()
        self.turn(0)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._there)
            try:
                await asyncio.gather(self._carry(reader, there_writer, False), self._carry(there_reader, writer, True))
            finally:
                there_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if is_back and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        raise ConnectionError
