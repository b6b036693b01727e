"""What the C++ checksums are compiled from; imports nothing that a build environment may lack."""

from __future__ import annotations

from pathlib import Path

from workers.machine.native_build import AVX2, AVX512, PLAIN_ARM, PLAIN_X86, SHARED, NativeSource

CHECKSUM = NativeSource(
    Path(__file__).parent / "source" / "checksum.cpp",
    "checksum",
    (AVX512, AVX2, PLAIN_X86, PLAIN_ARM),
    ("-std=c++20", "-O3", *SHARED),
)
