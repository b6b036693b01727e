"""A receiver's channels to senders that push, one for each sender and offer; knows not how they are made nor what they carry."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from workers.kv_transfer.transports.push import Inboxes
from workers.status import WorkerAddress


class PushChannel(Protocol):
    """What keeps a channel apart from others, and tells whether it is of use."""

    source: WorkerAddress
    offer: bytes
    inboxes: Inboxes

    async def close(self) -> None: ...


AnyChannel = TypeVar("AnyChannel", bound=PushChannel)


class Channels(Generic[AnyChannel]):
    """Used from one event loop."""

    def __init__(self) -> None:
        self._kept: dict[bytes, AnyChannel] = {}
        self._making = asyncio.Lock()

    async def get(self, source: WorkerAddress, offer: bytes, make: Callable[[], Awaitable[AnyChannel]]) -> AnyChannel:
        """The channel of that offer, made at the first call, one at a time; raises what `make` raises."""
        async with self._making:
            await self._close_useless(source, offer)
            key = source.worker_id.encode() + offer
            if key not in self._kept:
                self._kept[key] = await make()
            return self._kept[key]

    async def _close_useless(self, source: WorkerAddress, offer: bytes) -> None:
        """Broken channels, and idle ones that this sender's new offer replaces."""
        for key, channel in tuple(self._kept.items()):
            is_old = channel.source.worker_id == source.worker_id and channel.offer != offer
            if channel.inboxes.is_broken or (is_old and channel.inboxes.is_idle):
                await self._drop(key, channel)

    async def forget(self, worker_id: str) -> None:
        """Closes the channels to that sender."""
        for key, channel in tuple(self._kept.items()):
            if channel.source.worker_id == worker_id:
                await self._drop(key, channel)

    async def close(self) -> None:
        for key, channel in tuple(self._kept.items()):
            await self._drop(key, channel)

    async def _drop(self, key: bytes, channel: AnyChannel) -> None:
        """Unless somebody else did while another channel was being closed."""
        if self._kept.get(key) is channel:
            del self._kept[key]
            await channel.close()
