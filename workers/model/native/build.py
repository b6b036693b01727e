"""Has the model's kernels compiled for this machine; which processors they run on is decided here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workers import native_build
from workers.native_build import COMPILERS, BuildFailed, build_library, cpu_description, default_cache_folder

__all__ = ("SETS", "BuildFailed", "build", "default_cache_folder", "source_hash", "supported")

_MAIN = Path(__file__).parent / "source" / "baton.cpp"
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
"""No contraction: which products are fused with a sum is written in the source, not left to the compiler."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What a library is compiled for: its name, the compiler's flags, and what /proc/cpuinfo must list."""

    name: str
    flags: tuple[str, ...]
    cpu_flags: tuple[str, ...]


_AVX2 = InstructionSet("avx2", ("-mavx2", "-mfma", "-mf16c", "-mbmi2"), ("avx2", "fma", "f16c", "bmi2"))
_AVX512 = InstructionSet(
    "avx512",
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2.flags),
    ("avx512f", "avx512bw", "avx512vl", "avx512dq", *_AVX2.cpu_flags),
)
SETS = (
    InstructionSet("avx512bf16", ("-mavx512bf16", *_AVX512.flags), ("avx512_bf16", *_AVX512.cpu_flags)),
    _AVX512,
    _AVX2,
    InstructionSet("neonbf16", ("-march=armv8.2-a+bf16",), ("asimd", "bf16")),
    InstructionSet("neon", ("-march=armv8.2-a",), ("asimd",)),
)
"""Better ones first; their names are workers.config.INSTRUCTION_SETS."""


def source_hash() -> str:
    """Names the kernels' source; equal on every host that runs the same release."""
    return native_build.source_hash(_MAIN.parent)


def supported(description: str) -> tuple[InstructionSet, ...]:
    """The sets that a processor has, better ones first; `description` as /proc/cpuinfo gives it."""
    words = frozenset(description.split())
    return tuple(known for known in SETS if words.issuperset(known.cpu_flags))


def build(folder: Path, instruction_set: str = "auto", compilers: tuple[str, ...] = COMPILERS) -> Path:
    """The library's path in `folder`, compiled if it is not there yet. Raises BuildFailed."""
    usable = supported(cpu_description())
    if not usable:
        raise BuildFailed("the processor has neither AVX2 with FMA nor NEON")
    wanted = {known.name: known for known in usable} | {"auto": usable[0]}
    if instruction_set not in wanted:
        raise BuildFailed(f"the processor has no {instruction_set}; worker.instruction_set can be {', '.join(wanted)}")
    chosen = wanted[instruction_set]
    return build_library(_MAIN, f"kernels-{chosen.name}", folder, (*_FLAGS, *chosen.flags), compilers)
