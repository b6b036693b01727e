"""Memory at both ends of a NIXL read: the sender's pool by its addresses, and the slots that reads arrive in. Starts no read."""

from __future__ import annotations

import mmap
import threading

import numpy as np

from workers.kv_memory.memory import KvLayout
from workers.transports.contract import View
from workers.transports.nixl_agent import NixlAgent, ReadState
from workers.transports.pull import NUM_HELPERS

SLOT_BYTES = 2 << 20
"""What one read brings: large enough for the call to cost little beside it, small enough to be in a cache when it is copied on."""
NUM_SLOTS = 4 * NUM_HELPERS
"""Twice as many as are ever read at once, and again as many that hanging reads may hold."""


class Slots:
    """Registered memory that reads arrive in. Safe to use from helper threads."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, NUM_SLOTS * SLOT_BYTES)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self._free = list(range(NUM_SLOTS))
        self._hanging: dict[int, tuple[str, int]] = {}
        """{slot: (peer, the read that still has it)}."""
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A slot that no read has; None: there is none at the moment."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        with self._lock:
            self._free.append(slot)

    def lend(self, slot: int, peer: str, request: int) -> None:
        """Its read was given up and goes on: the slot comes back when that has ended."""
        with self._lock:
            self._hanging[slot] = peer, request

    def reclaim(self, agent: NixlAgent) -> set[str]:
        """Takes slots back whose reads have ended; the peers whose reads still hang."""
        with self._lock:
            for slot, (_, request) in tuple(self._hanging.items()):
                if agent.state(request) is not ReadState.RUNNING:
                    agent.release(request)
                    del self._hanging[slot]
                    self._free.append(slot)
            return {peer for peer, _ in self._hanging.values()}

    def view(self, slot: int) -> View:
        return self.bytes[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]


class RemoteSlice:
    """Bytes of a piece in a sender's pool."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes


class RemotePool:
    """A sender's pool by its addresses."""

    def __init__(self, address: int, layout: KvLayout) -> None:
        self._address, self._layout = address, layout

    def block(self, block_id: int, first_layer: int, num_layers: int) -> RemoteSlice:
        """As KvMemory.block. Raises IndexError when out of range."""
        layout = self._layout
        is_inside = 0 <= block_id < layout.num_blocks and first_layer >= 0 and num_layers >= 1
        if not is_inside or first_layer + num_layers > layout.num_layers:
            raise IndexError(f"block {block_id} layers {first_layer}+{num_layers} are outside the sender's pool")
        start = block_id * layout.block_bytes + first_layer * layout.layer_bytes
        return RemoteSlice(self._address + start, num_layers * layout.layer_bytes)
