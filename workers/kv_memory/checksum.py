"""Finds and loads the C++ checksums (source/checksum.cpp); a call runs without the interpreter's lock. Knows no pieces."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from workers.kv_memory.native.build import CHECKSUM
from workers.machine.native_build import BuildFailed, find_library, supported

log = logging.getLogger(__name__)


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


View = npt.NDArray[np.uint8]

MIN_NATIVE_BYTES = 241
"""XXH3 treats shorter inputs in other ways; KV has none, and xxhash knows them."""
STREAMING_BYTES = 8 << 20
"""From this much at once on, copies go past the caches: measured faster where the pool does not fit into them."""


def checksums(views: Sequence[View]) -> list[int]:
    """XXH3-64 of each view (uint8, contiguous). Without the interpreter's lock where the C++ library can be had."""
    _check(views)
    native = library()
    if native is None or not _all_long(views):
        return reference_checksums(views)
    return native.checksums([view.ctypes.data for view in views], [view.nbytes for view in views])


def copy_and_checksum(targets: Sequence[View], sources: Sequence[View], is_streaming: bool | None = None) -> list[int]:
    """Copies each source into its target (equal sizes, contiguous, not overlapping); XXH3-64 of what was copied.

    Each byte is read once where the C++ library can be had. `is_streaming`: past the caches; None: from STREAMING_BYTES on.
    """
    native = library()
    if any(target.nbytes != source.nbytes for target, source in zip(targets, sources, strict=True)):
        raise ValueError("a source has another size than its target")
    _check(targets)
    _check(sources)
    if native is None or not _all_long(sources):
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)
        return reference_checksums(targets)
    return native_copy(native, targets, sources, is_streaming)


def native_copy(
    native: Library, targets: Sequence[View], sources: Sequence[View], is_streaming: bool | None = None
) -> list[int]:
    """As copy_and_checksum, by the C++ library; `is_streaming` None: decided by the number of bytes."""
    sizes = [source.nbytes for source in sources]
    streaming = sum(sizes) >= STREAMING_BYTES if is_streaming is None else is_streaming
    return native.copy_and_checksum(
        [target.ctypes.data for target in targets], [source.ctypes.data for source in sources], sizes, streaming
    )


def reference_checksums(views: Sequence[View]) -> list[int]:
    """What `checksums` must equal."""
    return [xxhash.xxh3_64_intdigest(view.data) for view in views]


def _all_long(views: Sequence[View]) -> bool:
    return all(view.nbytes >= MIN_NATIVE_BYTES for view in views)


def _check(views: Sequence[View]) -> None:
    if not all(view.flags.c_contiguous for view in views):
        raise ValueError("a view is not contiguous")
