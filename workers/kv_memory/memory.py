"""The bytes of a worker's KV pool: anonymous shared memory that a peer on the same host can map, and that the kernel frees when its last user dies."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workers.errors import TransferFailed

NONCE_BYTES = 16
BITE_BYTES = 32 << 20
"""KV that one kind of copy moves between two steps at most: some milliseconds."""
NONCE_PAGE_BYTES = 4096
"""One page before the blocks holds a random nonce, so that a mapper knows it got the right memory."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_F_SEAL_FUTURE_WRITE = 0x0010
"""Of Linux 5.1: what is mapped stays writable, and nobody can write in any other way from then on."""
"""A pool never changes its size, so a peer that maps it cannot be killed by SIGBUS."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of a KV pool: [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim] of `dtype`, C order.

    Block-major, so a block is one contiguous run of bytes, and so is each layer of it (`layer_bytes`).
    """

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    itemsize: int

    # Asked for with every piece, so they are kept.
    layer_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of one layer (K and V) of one block."""
    block_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        layer_bytes = 2 * self.num_kv_heads * self.block_size * self.head_dim * self.itemsize
        object.__setattr__(self, "layer_bytes", layer_bytes)
        object.__setattr__(self, "block_bytes", self.num_layers * layer_bytes)

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def same_shape(a: KvLayout, b: KvLayout) -> bool:
    """Whether blocks of one pool fit into the other; the number of blocks may differ."""
    return (a.num_layers, a.num_kv_heads, a.block_size, a.head_dim, a.dtype, a.itemsize) == (
        b.num_layers,
        b.num_kv_heads,
        b.block_size,
        b.head_dim,
        b.dtype,
        b.itemsize,
    )


@dataclass(frozen=True, slots=True)
class SharedHandle:
    """Where a same-host peer finds a pool: /proc/<pid>/fd/<fd>, proven by `nonce`."""

    pid: int
    fd: int
    num_bytes: int
    nonce: bytes


class KvMemory:
    """Owns the bytes of one KV pool in a memfd. `bytes` is uint8 [num_blocks * block_bytes], writable, zeroed.

    memfd rather than a named segment: it has no name to leak after SIGKILL and no /dev/shm size limit.
    """

    device_address: int = 0
    """Where the same blocks lie in a GPU's memory, for which this is the mirror; 0: the model works on this memory itself."""
    device_index: int = 0

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self._fd = -1
        size = NONCE_PAGE_BYTES + layout.pool_bytes
        self._fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self._fd, 0o600)
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self._fd, size)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._map[: len(self._nonce)] = self._nonce
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8, offset=NONCE_PAGE_BYTES)

    def protect(self) -> None:
        """No other process can write into the pool from now on. Not for one that the ranks of a group share."""
        with contextlib.suppress(OSError):  # a kernel that does not know it
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)

    @property
    def copies(self) -> bool:
        """`adopt` and `expose` move bytes, so that many blocks at once keep the caller for long."""
        return False

    @property
    def blocks_per_bite(self) -> int:
        """What may be copied between two steps: others wait for the next."""
        return max(1, BITE_BYTES // self.layout.block_bytes)

    @property
    def handle(self) -> SharedHandle:
        return SharedHandle(os.getpid(), self._fd, len(self._map), self._nonce)

    def block(self, block_id: int, first_layer: int, num_layers: int) -> npt.NDArray[np.uint8]:
        """View of some layers of one block, uint8 [num_layers * layer_bytes]. Raises IndexError when out of range."""
        if not (0 <= block_id < self.layout.num_blocks and first_layer >= 0):
            raise IndexError(f"block {block_id} layer {first_layer} is outside the pool")
        if num_layers < 1 or first_layer + num_layers > self.layout.num_layers:
            raise IndexError(f"layers {first_layer}+{num_layers} are outside the model")
        start = block_id * self.layout.block_bytes + first_layer * self.layout.layer_bytes
        return self.bytes[start : start + num_layers * self.layout.layer_bytes]

    def expose(self, blocks: Sequence[int]) -> None:
        """Makes visible here what the model wrote to blocks. Nothing to do where it writes to this very memory."""

    def adopt(self, blocks: Sequence[int]) -> None:
        """Makes visible to the model what a transfer placed here. Nothing to do where it reads this very memory."""

    def copy_out(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Copies what the model wrote to whole blocks; `views` are uint8 [block_bytes] each. Done on return."""
        table = self.bytes.reshape(self.layout.num_blocks, -1)
        for block, view in zip(blocks, views, strict=True):
            view[:] = table[block]

    def copy_in(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Copies whole blocks to where the model reads them. Done on return."""
        table = self.bytes.reshape(self.layout.num_blocks, -1)
        for block, view in zip(blocks, views, strict=True):
            table[block] = view

    def close(self) -> None:
        """Drops this process's name for the memory; live views keep their pages until they go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def open_pool(handle: SharedHandle, mode: int) -> int:
    """A descriptor of the pool: a sealed memfd of this user and of that size. Raises OSError.

    What a peer names may be anything, also a pipe or a device: it is looked at before it is opened, and never waited for.
    """
    if handle.pid < 1 or handle.fd < 0:
        raise OSError("no process and no file have such numbers")
    seen = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(seen)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != handle.num_bytes:
            raise OSError("it is no file of this user and of the announced size")
        fd = os.open(f"/proc/self/fd/{seen}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(seen)
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError("it is not sealed against changes of its size")
    except OSError:
        os.close(fd)
        raise
    return fd


class MappedKvMemory:
    """A peer's pool mapped read-only. Raises TransferFailed when it is not there or not the right one."""

    def __init__(self, handle: SharedHandle, layout: KvLayout) -> None:
        expected = NONCE_PAGE_BYTES + layout.pool_bytes
        if handle.num_bytes != expected:
            raise TransferFailed(f"peer's pool has {handle.num_bytes} bytes, its layout says {expected}")
        try:
            fd = open_pool(handle, os.O_RDONLY)
        except OSError as error:
            raise TransferFailed(f"peer's pool cannot be opened: {error}") from error
        try:
            mapped = mmap.mmap(fd, expected, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransferFailed(f"peer's pool cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if mapped[: len(handle.nonce)] != handle.nonce:
            raise TransferFailed("peer's pool carries another nonce")
        self.layout = layout
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(mapped, dtype=np.uint8, offset=NONCE_PAGE_BYTES)

    def block(self, block_id: int, first_layer: int, num_layers: int) -> npt.NDArray[np.uint8]:
        """As KvMemory.block, read-only."""
        if not 0 <= block_id < self.layout.num_blocks or first_layer + num_layers > self.layout.num_layers:
            raise TransferFailed(f"block {block_id} is outside the peer's pool")
        start = block_id * self.layout.block_bytes + first_layer * self.layout.layer_bytes
        return self._bytes[start : start + num_layers * self.layout.layer_bytes]


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
            self._fd = open_pool(handle, os.O_RDWR)
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
