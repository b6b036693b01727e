"""Finds and loads the C++ checksums (source/checksum.cpp); a call runs without the interpreter's lock. Knows no pieces."""

from __future__ import annotations

import ctypes
import logging
import threading
from pathlib import Path

from workers.machine.instruction_sets import AVX2, AVX512, PLAIN_ARM, PLAIN_X86, supported
from workers.machine.native_build import SHARED, BuildFailed, NativeSource, find_library

log = logging.getLogger(__name__)

CHECKSUM = NativeSource(
    Path(__file__).parent / "source" / "checksum.cpp",
    "checksum",
    (AVX512, AVX2, PLAIN_X86, PLAIN_ARM),
    ("-std=c++20", "-O3", *SHARED),
)


class Library:
    """The two functions, for arrays of addresses and sizes. Every size is above 240 bytes."""

    def __init__(self, path: Path) -> None:
        """Raises BuildFailed when the file is no such library."""
        try:
            functions = ctypes.CDLL(str(path))
            self._checksum, self._copy = functions.baton_checksum, functions.baton_copy_and_checksum
        except (OSError, AttributeError) as error:
            raise BuildFailed(f"{path} cannot be loaded: {error}") from error
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._checksum.restype = self._copy.restype = None
        self._checksum.argtypes = (pointer, pointer, number, pointer)
        self._copy.argtypes = (pointer, pointer, pointer, number, number, pointer)

    def checksums(self, sources: list[int], sizes: list[int]) -> list[int]:
        count = len(sources)
        found = (ctypes.c_uint64 * count)()
        self._checksum((ctypes.c_void_p * count)(*sources), (ctypes.c_int64 * count)(*sizes), count, found)
        return list(found)

    def copy_and_checksum(
        self, targets: list[int], sources: list[int], sizes: list[int], is_streaming: bool
    ) -> list[int]:
        """No target overlaps a source. `is_streaming`: past the caches, for more bytes than they should give up."""
        count = len(sources)
        addresses = ctypes.c_void_p * count
        found = (ctypes.c_uint64 * count)()
        self._copy(
            addresses(*targets), addresses(*sources), (ctypes.c_int64 * count)(*sizes), count, int(is_streaming), found
        )
        return list(found)


_lock = threading.Lock()
_is_tried = False
_library: Library | None = None


def library(folder: Path | None = None) -> Library | None:
    """The library, built ahead or else compiled (about a second), and loaded on the first call; None where it cannot be had."""
    global _is_tried, _library
    with _lock:
        if not _is_tried:
            _is_tried = True
            try:
                best = next(iter(supported(CHECKSUM.sets)), None)
                if best is None:
                    raise BuildFailed("it is not made for this kind of processor")
                _library = Library(find_library(CHECKSUM, best, folder))
            except BuildFailed as error:
                log.warning("checksums of KV are computed by xxhash, in a second pass: %s", error)
        return _library
