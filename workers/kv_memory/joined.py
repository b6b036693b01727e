"""Another process's KV pool on this host, mapped to be written: the ranks of a group share the memory of the one that leads it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np

from workers.errors import TransferFailed
from workers.kv_memory.memory import _SEALS, NONCE_PAGE_BYTES, KvLayout, KvMemory, SharedHandle


class JoinedKvMemory(KvMemory):
    """The pool behind `handle`, with all its bytes. It lives on as long as any process has it, whoever made it.

    Only ranks of one group join a pool: each writes blocks or heads that are its alone. Everybody else maps pools
    read-only (MappedKvMemory). Raises TransferFailed when the pool is not there or not the right one, as on another host.
    """

    def __init__(self, handle: SharedHandle, layout: KvLayout) -> None:
        self.layout = layout
        self._fd = -1
        expected = NONCE_PAGE_BYTES + layout.pool_bytes
        if handle.num_bytes != expected:
            raise TransferFailed(f"the group's pool has {handle.num_bytes} bytes, its layout says {expected}")
        try:
            self._fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(self._fd).st_size != expected or fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise OSError("it is not a sealed memfd of the announced size")
            self._map = mmap.mmap(self._fd, expected)
        except OSError as error:
            self.close()
            raise TransferFailed(f"the group's pool cannot be joined: {error}") from error
        if self._map[: len(handle.nonce)] != handle.nonce:
            with contextlib.suppress(BufferError):
                self._map.close()
            self.close()
            raise TransferFailed("the group's pool carries another nonce")
        self._nonce = handle.nonce
        self.bytes = np.frombuffer(self._map, dtype=np.uint8, offset=NONCE_PAGE_BYTES)
