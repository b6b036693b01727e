"""A pytest plugin: every C++ library that this process loads is compiled with AddressSanitizer and UBSan. See sanitized.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workers.machine import native_build
from workers.machine.native_build import COMPILERS, InstructionSet, NativeSource, compile_library, default_cache_folder


def find_sanitized(
    source: NativeSource, instruction_set: InstructionSet, folder: Path | None, compilers: Sequence[str] = COMPILERS
) -> Path:
    return compile_library(source, instruction_set, folder or default_cache_folder(), compilers, sanitize=True)


# Plugins are imported before any test, and so before anything that takes the function by its name.
native_build.find_library = find_sanitized
