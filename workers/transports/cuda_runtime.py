"""The few calls of the CUDA runtime that cuda_ipc needs, through ctypes; addresses are integers. Not run on a GPU yet."""

from __future__ import annotations

import ctypes
from typing import Protocol

from workers.errors import TransferFailed

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
