"""Chooses the instruction set that the model's kernels run on, and gets their library: built ahead, or compiled for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workers.errors import InvalidConfig
from workers.machine import native_build
from workers.machine.native_build import (
    AMX,
    AUTO,
    AVX2,
    AVX512,
    AVX512BF16,
    COMPILERS,
    NEON,
    NEONBF16,
    SHARED,
    BuildFailed,
    InstructionSet,
    NativeSource,
    default_cache_folder,
    find_library,
)

__all__ = (
    "COMPILERS",
    "KERNELS",
    "BuildFailed",
    "build",
    "choices",
    "default_cache_folder",
    "source_hash",
    "supported",
)

KERNELS = NativeSource(
    Path(__file__).parent / "source" / "baton.cpp",
    "kernels",
    (AMX, AVX512BF16, AVX512, AVX2, NEONBF16, NEON),
    ("-std=c++20", "-O3", "-ffp-contract=off", "-pthread", "-Wno-psabi", *SHARED),
)
"""No contraction: which products are fused with a sum is written in the source, not left to the compiler."""


def source_hash() -> str:
    """Names the kernels' source; equal on every host that runs the same release."""
    return KERNELS.hash()


def supported(description: str | None = None, machine: str | None = None) -> tuple[InstructionSet, ...]:
    """The kernels' sets that a machine has, best first: the one at hand, or that of /proc/cpuinfo's text."""
    return native_build.supported(KERNELS.sets, description, machine)


def choices(
    wanted: str = AUTO, description: str | None = None, machine: str | None = None, source: NativeSource = KERNELS
) -> tuple[InstructionSet, ...]:
    """The sets to try, best first: all that the machine has, or the one that is asked for.

    Raises InvalidConfig when the one asked for is unknown or beyond the processor, BuildFailed when there is none at all.
    """
    able = native_build.supported(source.sets, description, machine)
    if wanted != AUTO:
        every = [each.name for each in source.sets]
        if wanted not in every:
            raise InvalidConfig(f"worker.instruction_set must be {AUTO} or one of {', '.join(every)}; it is {wanted!r}")
        if wanted not in [each.name for each in able]:
            names = ", ".join(each.name for each in able) or "none of the kernels' sets"
            raise InvalidConfig(
                f"worker.instruction_set is {wanted!r}, and this processor has {names}; set one that it has, or {AUTO}"
            )
        return tuple(each for each in able if each.name == wanted)
    if not able:
        raise BuildFailed("the processor has neither AVX2 with FMA, F16C and BMI2 nor NEON with atomics")
    return able


def build(folder: Path | None, instruction_set: str = AUTO, compilers: Sequence[str] = COMPILERS) -> Path:
    """The library's path, for the best set of those asked for that can be had.

    It is the one built ahead where there is one from just this source, else one compiled into `folder` (None: ~/.cache/baton).
    Raises BuildFailed, and InvalidConfig as `choices` does.
    """
    reasons: dict[str, str] = {}
    for each in choices(instruction_set):
        try:
            return find_library(KERNELS, each, folder, compilers)
        except BuildFailed as error:
            reasons.setdefault(str(error), each.name)
    raise BuildFailed("; ".join(f"{name}: {reason}" for reason, name in reasons.items()))
