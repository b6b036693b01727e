"""The kernels on instruction sets that this machine has, and under emulation on those it has not: all give the same bits, AMX in an arithmetic of its own.

What needs a cross compiler and qemu-user is left out where they are missing; `python -m tests.kernels` runs all by hand.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.builds import EMULATED, Build, Missing, by_case, native, sanitized
from workers.machine.native_build import AVX2
from workers.model.native.build import supported

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not supported(), reason="needs g++, and AVX2 with FMA or NEON"
)
needs_avx2 = pytest.mark.skipif(AVX2 not in supported(), reason="the emulation of AVX-512 is compiled for AVX2")


@pytest.fixture(scope="module")
def drivers() -> dict[str, Path]:
    """Compiled beside each other, where an earlier run has left none: each takes some twenty seconds."""
    builds = [sanitized(), *native(), *(EMULATED.values() if AVX2 in supported() else ())]

    def compiled(build: Build) -> Path | None:
        try:
            return build.compile()
        except Missing:
            return None

    with ThreadPoolExecutor(2) as threads:
        found = threads.map(compiled, builds)
    return {build.name: driver for build, driver in zip(builds, found, strict=True) if driver is not None}


@pytest.fixture(scope="module")
def computed(drivers: dict[str, Path]) -> dict[str, dict[str, str]]:
    """By each set of this processor, best first."""
    return {build.name: by_case(build.run(drivers[build.name])) for build in native()}


def require_same_bits(lines: dict[str, str], others: dict[str, str]) -> None:
    """AMX has an arithmetic of its own for bfloat16; all the rest is common to every set."""
    common = lines.keys() & others.keys()
    assert {"dense fp32 fma", "draw"} <= common
    assert {case: lines[case] for case in common} == {case: others[case] for case in common}


@pytest.mark.timeout(900)
def test_batch_chunks_and_threads_change_no_bit(computed: dict[str, dict[str, str]]) -> None:
    assert {len(lines) for lines in computed.values()} == {9}


@pytest.mark.timeout(900)
def test_calls_that_make_no_sense_are_refused_and_touch_nothing(drivers: dict[str, Path]) -> None:
    build = sanitized()
    build.run(drivers[build.name], "hostile", "1")


@pytest.mark.timeout(900)
def test_every_instruction_set_of_this_processor_computes_the_same_bits(
    computed: dict[str, dict[str, str]],
) -> None:
    first = next(lines for lines in computed.values() if "dense bf16 fma" in lines)
    for lines in computed.values():
        require_same_bits(lines, first)


@needs_avx2
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EMULATED)
def test_an_emulated_instruction_set_computes_the_same_bits(
    name: str, drivers: dict[str, Path], computed: dict[str, dict[str, str]]
) -> None:
    build = EMULATED[name]
    if build.name not in drivers:
        pytest.skip(f"needs {' or '.join((*build.compilers, *build.runners))}")
    try:
        lines = by_case(build.run(drivers[build.name]))
    except Missing as error:
        pytest.skip(f"needs {error}")
    for others in computed.values():
        require_same_bits(lines, others)
