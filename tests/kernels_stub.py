"""Makes the source folder of a library that passes for the kernels where one is needed that compiles at once."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from workers.machine.native_build import SHARED, InstructionSet, NativeSource
from workers.model.native.library import _SIGNATURES, Dimensions, StepArguments

STUB = Path(__file__).parent / "kernels_stub.cpp"


def instruction_set(name: str, *flags: str) -> InstructionSet:
    """One that every processor has."""
    return InstructionSet(name, platform.machine(), (f'-DNAME="{name}"', *flags), frozenset())


def write_stub(main: Path, **sizes: int) -> None:
    """`sizes`: what the library says that Dimensions and StepArguments take, where that is not what Python declares."""
    text = STUB.read_text()
    names = {"dimensions": ctypes.sizeof(Dimensions), "step": ctypes.sizeof(StepArguments)} | sizes
    lines = [f"#define {name.upper()}_BYTES {size}" for name, size in names.items()]
    missing = sorted(set(_SIGNATURES) - set(re.findall(r"baton_\w+", text)))
    lines += [f'extern "C" __attribute__((visibility("default"))) long {name}() {{ return 0; }}' for name in missing]
    main.parent.mkdir(parents=True, exist_ok=True)
    (main.parent / "rest.h").write_text("\n".join(lines) + "\n")
    main.write_text(text)


def stub_source(folder: Path, sets: Sequence[InstructionSet], **sizes: int) -> NativeSource:
    main = folder / "source" / "kernels.cpp"
    write_stub(main, **sizes)
    return NativeSource(main, "kernels", tuple(sets), ("-std=c++20", "-O1", *SHARED))
