"""Names the instruction sets that C++ is compiled for, and tells which of them a processor has; knows no compiler and no kernels."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

AUTO = "auto"
"""Asks for the best set of the processor at hand."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    name: str
    machine: str
    """As platform.machine() says it."""
    flags: tuple[str, ...]
    """What g++ and clang++ are told; nothing else may decide which instructions they use."""
    cpu_flags: frozenset[str]
    """What /proc/cpuinfo must show: everything that `flags` allow the compiler to use."""
    slow_on: str = ""
    """The vendor_id of processors on which every other set is faster."""


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX2_CPU = frozenset(("avx2", "fma", "f16c", "bmi2"))
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2)
_AVX512_CPU = _AVX2_CPU | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}

AVX2 = InstructionSet("avx2", "x86_64", _AVX2, _AVX2_CPU)
AVX512 = InstructionSet("avx512", "x86_64", _AVX512, _AVX512_CPU)
# On Intel's processors VDPBF16PS takes longer than the two multiplications that stand in for it: prompts took 2.4 times as long
# as with AVX512 alone on one with AMX.
AVX512BF16 = InstructionSet(
    "avx512bf16", "x86_64", (*_AVX512, "-mavx512bf16"), _AVX512_CPU | {"avx512_bf16"}, slow_on="GenuineIntel"
)
AMX = InstructionSet(
    "amx",
    "x86_64",
    (*AVX512BF16.flags, "-mamx-tile", "-mamx-bf16"),
    AVX512BF16.cpu_flags | {"amx_tile", "amx_bf16"},
)
# ARMv8.2 brings atomic instructions, which compilers then use without being asked.
NEON = InstructionSet("neon", "aarch64", ("-march=armv8.2-a",), frozenset(("asimd", "atomics")))
NEONBF16 = InstructionSet("neonbf16", "aarch64", ("-march=armv8.2-a+bf16",), frozenset(("asimd", "atomics", "bf16")))
PLAIN_X86 = InstructionSet("plain", "x86_64", (), frozenset())
PLAIN_ARM = InstructionSet("plain", "aarch64", (), frozenset())


def cpu_description() -> str:
    """What Linux says of the processors at hand, /proc/cpuinfo; empty where there is no such file."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_flags(description: str) -> frozenset[str]:
    """What every processor of a machine can, from the text of /proc/cpuinfo."""
    each = [frozenset(value.split()) for value in _values(description, "flags", "Features")]
    return frozenset.intersection(*each) if each else frozenset()


def supported(
    sets: Sequence[InstructionSet], description: str | None = None, machine: str | None = None
) -> tuple[InstructionSet, ...]:
    """Those of `sets` that a machine can run: the one at hand, or that of `description`. In the same order, the slow ones last."""
    description = cpu_description() if description is None else description
    flags, vendors = cpu_flags(description), _values(description, "vendor_id")
    machine = machine or platform.machine()
    able = [each for each in sets if each.machine == machine and each.cpu_flags <= flags]
    return tuple(sorted(able, key=lambda each: each.slow_on in vendors))


def _values(description: str, *keys: str) -> list[str]:
    lines = (line.partition(":") for line in description.splitlines())
    return [value.strip() for key, _, value in lines if key.strip() in keys]
