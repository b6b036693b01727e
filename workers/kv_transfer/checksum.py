"""Checksums of KV pieces, alone or while they are copied: XXH3-64, seed 0. Knows no transfers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

View = npt.NDArray[np.uint8]


def checksums(views: Sequence[View]) -> list[int]:
    """XXH3-64 of each view (uint8, contiguous)."""
    return [xxhash.xxh3_64_intdigest(view.data) for view in views]


def copy_and_checksum(targets: Sequence[View], sources: Sequence[View]) -> list[int]:
    """Copies each source into its target (equal sizes, contiguous, not overlapping); XXH3-64 of what was copied."""
    for target, source in zip(targets, sources, strict=True):
        np.copyto(target, source)
    return checksums(targets)
