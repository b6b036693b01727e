"""Reads an output stream as an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from router.backend import OutputStream
from workers.request import Output


class Reader:
    """The outputs of one stream as they come, up to its last one, or until `close`."""

    def __init__(self, stream: OutputStream) -> None:
        self._stream = stream
        self._is_over = False
        self._wake = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        while not self._is_over:
            self._wake.clear()
            output = self._stream.take(self._wake.set)
            if output is not None:
                self._is_over = output.finish_reason is not None
                return output
            await self._wake.wait()
        raise StopAsyncIteration

    def close(self) -> None:
        """The client leaves; whoever reads reads no more."""
        self._is_over = True
        self._stream.close()
        self._wake.set()
