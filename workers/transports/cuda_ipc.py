"""KV between pools in GPU memory of one host: the receiver opens the sender's pool and copies device to device. Not run on a GPU yet."""

from __future__ import annotations

import base64
import binascii
import ctypes
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from workers.errors import TransferFailed
from workers.kv_memory.checksum import checksums
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.machine.threads import started_threads
from workers.status import WorkerAddress
from workers.transports.contract import OutgoingPiece, View
from workers.transports.offers import decode, decode_hex, encode
from workers.transports.pull import PullChannel

HANDLE_BYTES = 64
_TO_HOST, _ON_DEVICE = 2, 3
_LAZY_PEER_ACCESS = 1
_LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12")


class CudaRuntime(Protocol):
    """Every call raises TransferFailed. Streams and device addresses are plain integers."""

    def use_device(self, index: int) -> None:
        """For the calling thread."""
        ...

    def allocate(self, content: bytes) -> int: ...
    def free(self, address: int) -> None: ...
    def export(self, address: int) -> tuple[bytes, int]:
        """(handle of the allocation that holds the address, the address's offset in it)."""
        ...

    def open(self, handle: bytes) -> int: ...
    def close(self, address: int) -> None: ...
    def make_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def copy_on_device(self, target: int, source: int, num_bytes: int, stream: int) -> None: ...
    def copy_to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None: ...
    def wait(self, stream: int) -> None: ...


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class LoadedCudaRuntime:
    """libcudart, and libcuda for the bounds of an allocation. Raises TransferFailed where they are missing."""

    def __init__(self) -> None:
        for name in _LIBRARIES:
            try:
                self._runtime = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise TransferFailed("the CUDA runtime is not installed")
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransferFailed(f"there is no CUDA driver: {error}") from error

    def use_device(self, index: int) -> None:
        _check("cudaSetDevice", self._runtime.cudaSetDevice(ctypes.c_int(index)))

    def allocate(self, content: bytes) -> int:
        address = ctypes.c_void_p()
        _check("cudaMalloc", self._runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(len(content))))
        status = self._runtime.cudaMemcpy(address, content, ctypes.c_size_t(len(content)), ctypes.c_int(1))
        _check("cudaMemcpy", status)
        return address.value or 0

    def free(self, address: int) -> None:
        _check("cudaFree", self._runtime.cudaFree(ctypes.c_void_p(address)))

    def export(self, address: int) -> tuple[bytes, int]:
        base, size, handle = ctypes.c_void_p(), ctypes.c_size_t(), _Handle()
        status = self._driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_void_p(address))
        _check("cuMemGetAddressRange", status)
        _check("cudaIpcGetMemHandle", self._runtime.cudaIpcGetMemHandle(ctypes.byref(handle), base))
        return bytes(handle), address - (base.value or 0)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        given = _Handle.from_buffer_copy(handle)
        status = self._runtime.cudaIpcOpenMemHandle(ctypes.byref(address), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
        _check("cudaIpcOpenMemHandle", status)
        return address.value or 0

    def close(self, address: int) -> None:
        _check("cudaIpcCloseMemHandle", self._runtime.cudaIpcCloseMemHandle(ctypes.c_void_p(address)))

    def make_stream(self) -> int:
        stream = ctypes.c_void_p()
        status = self._runtime.cudaStreamCreateWithFlags(ctypes.byref(stream), ctypes.c_uint(1))  # not blocking
        _check("cudaStreamCreateWithFlags", status)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        _check("cudaStreamDestroy", self._runtime.cudaStreamDestroy(ctypes.c_void_p(stream)))

    def copy_on_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._copy(target, source, num_bytes, _ON_DEVICE, stream)

    def copy_to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._copy(target, source, num_bytes, _TO_HOST, stream)

    def wait(self, stream: int) -> None:
        _check("cudaStreamSynchronize", self._runtime.cudaStreamSynchronize(ctypes.c_void_p(stream)))

    def _copy(self, target: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
        status = self._runtime.cudaMemcpyAsync(
            ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(num_bytes), ctypes.c_int(kind),
            ctypes.c_void_p(stream),
        )  # fmt: skip
        _check("cudaMemcpyAsync", status)


def _check(call: str, status: int) -> None:
    if status:
        raise TransferFailed(f"{call} failed with error {status}")


_NONCE_BYTES = 16
_FIELDS: dict[str, type[int] | type[str]] = {
    "pool": str, "pool_offset": int, "nonce_at": str, "nonce_offset": int, "nonce": str,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeviceSlice:
    """Bytes in device memory."""

    address: int
    nbytes: int


class OpenedPool:
    """A sender's pool in this process's address space."""

    def __init__(self, address: int, layout: KvLayout) -> None:
        self._address, self._layout = address, layout

    def block(self, block_id: int, first_layer: int, num_layers: int) -> DeviceSlice:
        """Raises IndexError when out of range."""
        layout = self._layout
        if not (0 <= block_id < layout.num_blocks and 0 <= first_layer < first_layer + num_layers <= layout.num_layers):
            raise IndexError(f"block {block_id} is outside the peer's pool")
        first = block_id * layout.block_bytes + first_layer * layout.layer_bytes
        return DeviceSlice(self._address + first, num_layers * layout.layer_bytes)


class CudaIpcTransport:
    """Each piece is copied into our pool on the device and into its mirror on the host, where the session verifies it.

    The nonce lies in a small allocation of its own: reading it back shows that handles of this very sender were opened.
    """

    name = "cuda_ipc"
    is_pulled = True

    def __init__(
        self, memory: KvMemory, host: str, load_runtime: Callable[[], CudaRuntime] = LoadedCudaRuntime
    ) -> None:
        self._memory, self._host = memory, host
        self._load_runtime = load_runtime
        self._runtime: CudaRuntime | None = None
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonce_address = 0
        self._stream = 0
        self._helpers = started_threads(1, "kv-cuda-ipc")
        self._channels: dict[bytes, tuple[str, int, PullChannel]] = {}
        """{offer: (sender, the opened allocation, channel)}."""

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        if host != self._host or not self._memory.device_address:
            return None
        try:
            runtime = self._ready()
            if not self._nonce_address:
                self._nonce_address = runtime.allocate(self._nonce)
            pool, pool_offset = runtime.export(self._memory.device_address)
            nonce_at, nonce_offset = runtime.export(self._nonce_address)
        except TransferFailed:
            return None
        return encode(
            {"pool": base64.b64encode(pool).decode(), "pool_offset": pool_offset,
             "nonce_at": base64.b64encode(nonce_at).decode(), "nonce_offset": nonce_offset, "nonce": self._nonce.hex()}
        )  # fmt: skip

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> PullChannel:
        fields = decode(offer, _FIELDS)
        if not self._memory.device_address:
            raise TransferFailed("our own pool is not on a GPU")
        if offer in self._channels:
            return self._channels[offer][2]
        runtime = self._ready()
        self._check_nonce(runtime, _handle(fields["nonce_at"]), int(fields["nonce_offset"]),
                          decode_hex(fields["nonce"], _NONCE_BYTES))  # fmt: skip
        allocation = runtime.open(_handle(fields["pool"]))
        pool = OpenedPool(allocation + int(fields["pool_offset"]), layout)
        channel = PullChannel(lambda: pool, self._helpers, self._copy)
        self._channels[offer] = (source.worker_id, allocation, channel)
        return channel

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        """The receiver copies; nothing to do here."""

    async def forget(self, worker_id: str) -> None:
        for offer, (owner, allocation, channel) in tuple(self._channels.items()):
            if owner == worker_id:
                del self._channels[offer]
                await channel.close()
                self._ready().close(allocation)

    async def close(self) -> None:
        for owner in {owner for owner, _, _ in self._channels.values()}:
            await self.forget(owner)
        if self._nonce_address:
            self._ready().free(self._nonce_address)
            self._nonce_address = 0
        if self._stream:
            self._ready().destroy_stream(self._stream)
            self._stream = 0
        self._helpers.shutdown()

    def _ready(self) -> CudaRuntime:
        if self._runtime is None:
            self._runtime = self._load_runtime()
        self._runtime.use_device(self._memory.device_index)
        if not self._stream:
            self._stream = self._runtime.make_stream()
        return self._runtime

    def _check_nonce(self, runtime: CudaRuntime, handle: bytes, offset: int, nonce: bytes) -> None:
        allocation = runtime.open(handle)
        try:
            found = np.zeros(_NONCE_BYTES, np.uint8)
            runtime.copy_to_host(found.ctypes.data, allocation + offset, _NONCE_BYTES, self._stream)
            runtime.wait(self._stream)
        finally:
            runtime.close(allocation)
        if found.tobytes() != nonce:
            raise TransferFailed("the peer's GPU memory carries another nonce")

    def _copy(self, targets: Sequence[View], sources: Sequence[DeviceSlice], is_large: bool) -> Sequence[int]:
        runtime = self._ready()
        base, mirror = self._memory.device_address, self._memory.bytes.ctypes.data
        for target, source in zip(targets, sources, strict=True):
            home = base + target.ctypes.data - mirror
            runtime.copy_on_device(home, source.address, source.nbytes, self._stream)
            runtime.copy_to_host(target.ctypes.data, home, source.nbytes, self._stream)
        runtime.wait(self._stream)
        return checksums(targets)


def _handle(text: int | str) -> bytes:
    """Raises TransferFailed."""
    try:
        handle = base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise TransferFailed("a handle of an offer is not base64") from error
    if len(handle) != HANDLE_BYTES:
        raise TransferFailed(f"a handle of an offer has {len(handle)} bytes")
    return handle
