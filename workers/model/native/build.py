"""Chooses the instruction set that the model's kernels run on, and gets their library: built ahead, or compiled for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workers.errors import InvalidConfig
from workers.instruction_sets import (
    AMX,
    AUTO,
    AVX2,
    AVX512,
    AVX512BF16,
    NEON,
    NEONBF16,
    InstructionSet,
    supported,
)
from workers.native_build import (
    COMPILERS,
    BuildFailed,
    NativeSource,
    compile_library,
    default_cache_folder,
    find_library,
)

__all__ = ("KERNELS", "BuildFailed", "build", "choices", "default_cache_folder", "source_hash")

KERNELS = NativeSource(
    Path(__file__).parent / "source" / "baton.cpp",
    "kernels",
    (AMX, AVX512BF16, AVX512, AVX2, NEONBF16, NEON),
    ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-fvisibility=hidden"),
)
"""No contraction: which products are fused with a sum is written in the source, not left to the compiler."""


def source_hash() -> str:
    """Names the kernels' source; equal on every host that runs the same release."""
    return KERNELS.hash()


def choices(
    wanted: str = AUTO, cpu: frozenset[str] | None = None, machine: str | None = None
) -> tuple[InstructionSet, ...]:
    """The sets to try, best first: all that the processor has, or the one that is asked for.

    Raises InvalidConfig when the one asked for is unknown or beyond the processor, BuildFailed when it has none at all.
    """
    able = supported(KERNELS.sets, cpu, machine)
    names = ", ".join(each.name for each in able) or "none of the kernels' sets"
    if wanted != AUTO:
        if wanted not in [each.name for each in KERNELS.sets]:
            every = ", ".join(each.name for each in KERNELS.sets)
            raise InvalidConfig(f"worker.instruction_set must be {AUTO} or one of {every}; it is {wanted!r}")
        able = tuple(each for each in able if each.name == wanted)
        if not able:
            raise InvalidConfig(
                f"worker.instruction_set {wanted!r} is not what this processor has ({names}); set one of those, or {AUTO}"
            )
    if not able:
        least = ", ".join(sorted(AVX2.cpu_flags))
        raise BuildFailed(f"the processor has no instruction set of the kernels (on x86-64 they need {least})")
    return able


def build(
    folder: Path, instruction_set: str = AUTO, compilers: Sequence[str] = COMPILERS, sanitize: bool = False
) -> Path:
    """The library's path, for the best set of those asked for that can be had.

    The library built ahead when there is one from just this source; else one compiled into `folder`. `sanitize`: always
    compiled, with AddressSanitizer and UBSan; the process that loads it must have started with their libraries
    (tests/sanitized.py does that). Raises BuildFailed, and InvalidConfig as `choices` does.
    """
    reasons: dict[str, str] = {}
    for each in choices(instruction_set):
        try:
            if sanitize:
                return compile_library(KERNELS, each, folder, compilers, sanitize=True)
            return find_library(KERNELS, each, folder, compilers)
        except BuildFailed as error:
            reasons.setdefault(str(error), each.name)
    raise BuildFailed("; ".join(f"{name}: {reason}" for reason, name in reasons.items()))
