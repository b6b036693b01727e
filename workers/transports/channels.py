"""A receiver's channels to senders, one for each sender and offer, and which offers could not be dialled; knows not how they are made nor what they carry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, Protocol, TypeVar

from workers.errors import TransferFailed
from workers.status import WorkerAddress
from workers.transports.offers import Peer

log = logging.getLogger(__name__)

MAX_CHANNELS = 256
"""Kept at once; the one that is idle and was asked for longest ago goes first, one in use never."""
FAILED_S = 5.0
"""An offer that could not be dialled is not dialled again for so long: whoever asks hears it at once and takes the next transport."""
_MAX_FAILED = 1024


class KeptChannel(Protocol):
    """What keeps a channel apart from others, and tells whether it is of use."""

    source: WorkerAddress
    offer: bytes

    @property
    def is_broken(self) -> bool: ...

    @property
    def is_idle(self) -> bool:
        """Whether no transfer uses the channel."""
        ...

    async def close(self) -> None: ...


AnyChannel = TypeVar("AnyChannel", bound=KeptChannel)


class Channels(Generic[AnyChannel]):
    """Used from one event loop. A dial holds up nobody but those who want that very channel."""

    def __init__(self, max_channels: int = MAX_CHANNELS) -> None:
        self._max_channels = max_channels
        self._kept: OrderedDict[bytes, AnyChannel] = OrderedDict()
        self._making: dict[bytes, asyncio.Task[AnyChannel]] = {}
        self._num_waiting: Counter[bytes] = Counter()
        self._given_up: set[asyncio.Task[AnyChannel]] = set()
        """Dials that nobody waits for any more, until they have ended."""
        self._failed: OrderedDict[bytes, tuple[float, str, str]] = OrderedDict()
        """{key: (until when it is believed, worker id, reason)}, the oldest first."""

    async def get(self, source: WorkerAddress, offer: bytes, make: Callable[[], Awaitable[AnyChannel]]) -> AnyChannel:
        """The channel of that offer. Who asks while it is being made waits for the same one. Raises what `make` raises."""
        key = source.worker_id.encode() + b"\0" + offer
        kept = self._kept.get(key)
        if kept is not None and not kept.is_broken:
            self._kept.move_to_end(key)
            return kept
        making = self._making.get(key)
        if making is None:
            until_s, _, reason = self._failed.get(key, (0.0, "", ""))
            if time.monotonic() < until_s:
                raise TransferFailed(f"{reason} (not dialled again for {FAILED_S:g} s)")
            making = self._making[key] = asyncio.create_task(self._make(key, source, offer, make))
            making.add_done_callback(lambda ended: self._made(key, source, ended))
        self._num_waiting[key] += 1
        try:
            # Whoever is cancelled leaves the dial to the others; the last one ends it.
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            if making.cancelled() and not _is_cancelled():
                raise TransferFailed(f"{source.worker_id} was given up while it was being dialled") from None
            raise
        finally:
            self._num_waiting[key] -= 1
            if not self._num_waiting[key]:
                del self._num_waiting[key]
                if self._making.get(key) is making and not making.done():
                    del self._making[key]
                    self._given_up.add(making)
                    making.add_done_callback(self._given_up.discard)
                    making.cancel()
                    await asyncio.wait((making,))  # nothing of it is left when the caller goes on

    async def _make(
        self, key: bytes, source: WorkerAddress, offer: bytes, make: Callable[[], Awaitable[AnyChannel]]
    ) -> AnyChannel:
        await self._make_room()
        channel = await make()
        self._kept[key] = channel
        for other, old in tuple(self._kept.items()):  # that this sender's new offer replaces
            if other != key and old.source.worker_id == source.worker_id and old.is_idle:
                await self._drop(other, old)
        return channel

    def _made(self, key: bytes, source: WorkerAddress, ended: asyncio.Task[AnyChannel]) -> None:
        if self._making.get(key) is ended:
            del self._making[key]
        if ended.cancelled():
            return
        error = ended.exception()
        self._failed.pop(key, None)
        if isinstance(error, TransferFailed):
            log.warning("no channel to %s: %s", source.worker_id, error)
            self._failed[key] = (time.monotonic() + FAILED_S, source.worker_id, str(error))
            if len(self._failed) > _MAX_FAILED:
                self._failed.popitem(last=False)

    async def _make_room(self) -> None:
        """Closes broken channels, and idle ones beyond the bound."""
        for key, channel in tuple(self._kept.items()):
            if channel.is_broken:
                await self._drop(key, channel)
        while len(self._kept) + len(self._making) > self._max_channels:
            idle = next(((key, channel) for key, channel in self._kept.items() if channel.is_idle), None)
            if idle is None:
                raise TransferFailed(f"{self._max_channels} senders are connected and in use")
            await self._drop(*idle)

    async def forget(self, worker_id: str) -> None:
        """Closes the channels to that sender, and believes that it can be dialled."""
        prefix = worker_id.encode() + b"\0"
        await self._stop_making([key for key in self._making if key.startswith(prefix)])
        for key in [key for key, (_, failed, _) in self._failed.items() if failed == worker_id]:
            del self._failed[key]
        for key, channel in tuple(self._kept.items()):
            if channel.source.worker_id == worker_id:
                await self._drop(key, channel)

    async def close(self) -> None:
        await self._stop_making(list(self._making))
        if self._given_up:
            await asyncio.wait(tuple(self._given_up))
        for key, channel in tuple(self._kept.items()):
            await self._drop(key, channel)

    async def _stop_making(self, keys: list[bytes]) -> None:
        tasks = [self._making.pop(key) for key in keys]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _drop(self, key: bytes, channel: AnyChannel) -> None:
        """Unless somebody else did while another channel was being closed."""
        if self._kept.get(key) is channel:
            del self._kept[key]
            await channel.close()


def _is_cancelled() -> bool:
    """Whether it is the running task that was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


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


class SenderLinks(Generic[AnyLink]):
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
