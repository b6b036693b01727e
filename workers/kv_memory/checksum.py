"""Checksums of KV pieces, alone or while they are copied: XXH3-64, seed 0. Knows no transfers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from workers.kv_memory.native.library import Library, library

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
