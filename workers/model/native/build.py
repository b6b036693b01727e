"""Has the model's kernels compiled for this machine; which processors they run on is decided here."""

from __future__ import annotations

from pathlib import Path

from workers import native_build
from workers.native_build import COMPILERS, BuildFailed, build_library, cpu_description, default_cache_folder

__all__ = ("BuildFailed", "build", "default_cache_folder", "source_hash")

_MAIN = Path(__file__).parent / "source" / "baton.cpp"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
"""No contraction: which products are fused with a sum is written in the source, not left to the compiler."""


def source_hash() -> str:
    """Names the kernels' source; equal on every host that runs the same release."""
    return native_build.source_hash(_MAIN.parent)


def build(folder: Path, compilers: tuple[str, ...] = COMPILERS) -> Path:
    """The library's path in `folder`, compiled if it is not there yet. Raises BuildFailed."""
    if "avx512f" not in cpu_description():
        raise BuildFailed("the processor has no AVX-512")
    return build_library(_MAIN, "kernels", folder, _FLAGS, compilers)
