"""KV between workers of one process: the receiver copies straight out of the sender's pool. Knows no operating system."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.status import WorkerAddress
from workers.transports.contract import OutgoingPiece
from workers.transports.offers import decode, encode
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
        self._helpers = ThreadPoolExecutor(NUM_HELPERS, thread_name_prefix="kv-loopback")
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
