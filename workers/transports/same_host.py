"""The ways that need no network: a receiver in the same process copies from the sender's pool, one in another process of the host maps it first."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Sequence

from workers.errors import TransferFailed
from workers.kv_memory.memory import NONCE_BYTES, KvLayout, KvMemory, MappedKvMemory, SharedHandle
from workers.machine.threads import started_threads
from workers.status import WorkerAddress
from workers.transports.contract import OutgoingPiece
from workers.transports.offers import decode, decode_hex, encode
from workers.transports.pull import NUM_HELPERS, PullChannel

_lock = threading.Lock()
_pools: dict[str, tuple[str, KvMemory]] = {}
"""Of every open loopback transport in this process: {token: (worker id, pool)}."""


class LoopbackTransport:
    """Offered to workers of this very process only."""

    name = "loopback"
    is_pulled = True

    def __init__(self, memory: KvMemory, worker_id: str) -> None:
        self._token = secrets.token_hex(16)
        self._helpers = started_threads(NUM_HELPERS, "kv-loopback")
        self._channels: dict[str, tuple[str, PullChannel]] = {}
        with _lock:
            _pools[self._token] = (worker_id, memory)

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        with _lock:
            is_here = any(worker_id == target.worker_id for worker_id, _ in _pools.values())
        return encode({"pid": os.getpid(), "token": self._token}) if is_here else None

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> PullChannel:
        fields = decode(offer, {"pid": int, "token": str})
        token = str(fields["token"])
        with _lock:
            owner, pool = _pools.get(token, ("", None))
        if fields["pid"] != os.getpid() or pool is None or owner != source.worker_id:
            raise TransferFailed(f"{source.worker_id} is not in this process")
        if pool.layout != layout:
            raise TransferFailed(f"{source.worker_id} announced another layout than its pool has")
        for other, (_, channel) in tuple(self._channels.items()):
            if other not in _pools and channel.is_idle:
                del self._channels[other]
        if token not in self._channels:
            channel = PullChannel(lambda: _pools.get(token, ("", None))[1], self._helpers)
            self._channels[token] = (source.worker_id, channel)
        return self._channels[token][1]

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        """The receiver copies; nothing to do here."""

    async def forget(self, worker_id: str) -> None:
        for token, (owner, channel) in tuple(self._channels.items()):
            if owner == worker_id:
                del self._channels[token]
                await channel.close()

    async def close(self) -> None:
        with _lock:
            _pools.pop(self._token, None)
        for owner in {owner for owner, _ in self._channels.values()}:
            await self.forget(owner)
        self._helpers.shutdown()


MAX_MAPS = 64
"""Pools kept mapped; the mapping that is unused and oldest goes first."""
MAP_S = 5.0
_FIELDS: dict[str, type[int] | type[str]] = {"pid": int, "fd": int, "num_bytes": int, "nonce": str}


class ShmTransport:
    """Offered to receivers that name the same host; those in another PID namespace fail to connect and go on to the next."""

    name = "shm"
    is_pulled = True

    def __init__(self, memory: KvMemory, host: str) -> None:
        self._memory = memory
        self._host = host
        self._helpers = started_threads(NUM_HELPERS, "kv-shm")
        self._channels: dict[bytes, tuple[WorkerAddress, int, PullChannel]] = {}
        """{offer: (sender, its pid, channel)}, the longest unused first. An offer holds a nonce, so it never means two pools."""

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        if host != self._host:
            return None
        handle = self._memory.handle
        return encode({"pid": handle.pid, "fd": handle.fd, "num_bytes": handle.num_bytes, "nonce": handle.nonce.hex()})

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> PullChannel:
        kept = self._channels.pop(offer, None)
        if kept is None:
            fields = decode(offer, _FIELDS)
            handle = SharedHandle(
                int(fields["pid"]),
                int(fields["fd"]),
                int(fields["num_bytes"]),
                decode_hex(fields["nonce"], NONCE_BYTES),
            )
            pool = await self._map(handle, layout)
            await self._make_room()
            kept = self._channels.pop(offer, None) or (source, handle.pid, PullChannel(lambda: pool, self._helpers))
        elif kept[0].worker_id != source.worker_id:
            raise TransferFailed(f"{source.worker_id} offers the pool of {kept[0].worker_id}")
        self._channels[offer] = kept
        return kept[2]

    async def _map(self, handle: SharedHandle, layout: KvLayout) -> MappedKvMemory:
        """On a helper thread: what a peer names may lie on a file system that hangs. Raises TransferFailed."""
        try:
            async with asyncio.timeout(MAP_S):
                return await asyncio.to_thread(MappedKvMemory, handle, layout)
        except TimeoutError as error:
            raise TransferFailed("peer's pool does not open") from error

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        """The receiver copies; nothing to do here."""

    async def forget(self, worker_id: str) -> None:
        for offer, (source, _, _) in tuple(self._channels.items()):
            if source.worker_id == worker_id:
                await self._drop(offer)

    async def close(self) -> None:
        for offer in tuple(self._channels):
            await self._drop(offer)
        self._helpers.shutdown()

    async def sweep(self) -> None:
        """A mapping keeps a dead sender's whole pool in memory."""
        for offer, (_, pid, channel) in tuple(self._channels.items()):
            if channel.is_idle and not os.path.exists(f"/proc/{pid}"):
                await self._drop(offer)

    async def _make_room(self) -> None:
        await self.sweep()
        idle = [offer for offer, (_, _, channel) in self._channels.items() if channel.is_idle]
        for offer in idle[: max(0, len(self._channels) - MAX_MAPS + 1)]:
            await self._drop(offer)
        if len(self._channels) >= MAX_MAPS:
            raise TransferFailed(f"{MAX_MAPS} pools are mapped and in use")

    async def _drop(self, offer: bytes) -> None:
        kept = self._channels.pop(offer, None)
        if kept is not None:
            await kept[2].close()
