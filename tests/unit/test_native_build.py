"""Which library a worker loads: the instruction set, built ahead or compiled, and what is refused and why."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import get_args

import pytest
from kernels_stub import instruction_set, stub_source

from cluster.settings import build
from workers.config import InstructionSet as Setting
from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.kv_memory.native.build import CHECKSUM
from workers.machine.native_build import (
    BuildFailed,
    InstructionSet,
    NativeSource,
    compile_library,
    cpu_flags,
    find_library,
)
from workers.model.native.build import KERNELS, choices, supported
from workers.model.native.loading import check, load

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

ZEN3 = "fma sse4_2 avx f16c bmi1 avx2 bmi2"
SKYLAKE = f"{ZEN3} avx512f avx512dq avx512bw avx512vl"
ZEN4 = f"{SKYLAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} amx_bf16 amx_tile amx_int8"


def cpuinfo(*processors: str, key: str = "flags\t\t") -> str:
    return "".join(f"processor\t: {i}\n{key}: {flags}\n\n" for i, flags in enumerate(processors))


def names(sets: tuple[InstructionSet, ...]) -> list[str]:
    return [each.name for each in sets]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (SAPPHIRE_RAPIDS, ["amx", "avx512bf16", "avx512", "avx2"]),
        (SAPPHIRE_RAPIDS.replace("amx_tile", ""), ["avx512bf16", "avx512", "avx2"]),
        (ZEN4, ["avx512bf16", "avx512", "avx2"]),
        (SKYLAKE, ["avx512", "avx2"]),
        (ZEN3, ["avx2"]),
        (ZEN3.replace("bmi2", ""), []),
        (SKYLAKE.replace("avx512vl", ""), ["avx2"]),
    ],
)
def test_a_processor_gets_every_set_whose_instructions_it_has_best_first(flags: str, expected: list[str]) -> None:
    assert names(supported(cpuinfo(flags, flags), "x86_64")) == expected


def test_a_set_that_is_slow_on_a_vendors_processors_comes_last_there() -> None:
    intel = cpuinfo(SAPPHIRE_RAPIDS).replace("processor", "vendor_id\t: GenuineIntel\nprocessor")
    assert names(supported(intel, "x86_64")) == ["amx", "avx512", "avx2", "avx512bf16"]
    amd = cpuinfo(ZEN4).replace("processor", "vendor_id\t: AuthenticAMD\nprocessor")
    assert names(supported(amd, "x86_64")) == ["avx512bf16", "avx512", "avx2"]


def test_an_arm_processor_gets_neon_and_no_set_of_another_kind_of_machine() -> None:
    arm = cpuinfo("fp asimd evtstrm atomics", key="Features\t")
    assert names(supported(arm, "aarch64")) == ["neon"]
    assert supported(arm, "x86_64") == () == supported(cpuinfo(ZEN4), "aarch64")
    assert supported(cpuinfo("fp asimd", key="Features\t"), "aarch64") == ()


def test_what_one_of_two_processors_lacks_is_not_used() -> None:
    assert cpu_flags(cpuinfo("a b c", "b c d")) == {"b", "c"}
    assert cpu_flags("") == frozenset()


def test_a_set_that_the_processor_lacks_is_refused_with_those_that_it_has() -> None:
    assert names(choices("avx2", cpuinfo(SKYLAKE), "x86_64")) == ["avx2"]
    with pytest.raises(
        InvalidConfig, match="'avx512bf16', and this processor has avx512, avx2; set one that it has, or auto"
    ):
        choices("avx512bf16", cpuinfo(SKYLAKE), "x86_64")
    with pytest.raises(InvalidConfig, match="'avx2', and this processor has none of the kernels' sets"):
        choices("avx2", "", "x86_64")
    with pytest.raises(BuildFailed, match="neither AVX2"):
        choices("auto", "", "x86_64")


def test_a_set_that_nobody_has_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        InvalidConfig, match="must be auto or one of amx, avx512bf16, avx512, avx2, neonbf16, neon; it is 'sse'"
    ):
        choices("sse")
    with pytest.raises(InvalidConfig, match=r"instruction_set must be 'amx', .* or 'auto'; it is 'sse'"):
        build(WorkerConfig, {"model": "m", "instruction_set": "sse"})
    assert names(KERNELS.sets) == list(get_args(Setting))


@pytest.mark.parametrize("each", [*KERNELS.sets, *CHECKSUM.sets], ids=lambda each: each.name)
def test_whatever_the_compiler_may_use_the_processor_must_have(each: InstructionSet) -> None:
    spelled = {"avx512bf16": "avx512_bf16", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
    allowed = {flag.removeprefix("-m") for flag in each.flags if not flag.startswith("-march")}
    assert {spelled.get(flag, flag) for flag in allowed} == (each.cpu_flags if each.machine == "x86_64" else set())


@pytest.fixture
def source(tmp_path: Path) -> NativeSource:
    return stub_source(tmp_path / "package", [instruction_set("fast"), instruction_set("slow")])


def build_ahead(source: NativeSource, which: int) -> Path:
    place = source.prebuilt(source.sets[which])
    place.parent.mkdir(exist_ok=True)
    made = compile_library(source, source.sets[which], source.prebuilt_folder)
    return made.rename(place)


@needs_compiler
def test_a_library_built_ahead_needs_no_compiler_and_no_cache_folder(
    source: NativeSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = build_ahead(source, 0)
    with caplog.at_level(logging.INFO):
        assert find_library(source, source.sets[0], tmp_path / "cache", compilers=()) == ahead
    assert f"kernels for fast: built ahead: {ahead}" in caplog.messages
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_without_one_the_library_is_compiled_at_first_use_and_the_log_says_so(
    source: NativeSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        compiled = find_library(source, source.sets[0], tmp_path / "cache")
    assert compiled.parent == tmp_path / "cache"
    assert f"kernels for fast: compiled at first use: {compiled}" in caplog.messages
    with pytest.raises(BuildFailed, match="none was built ahead, and no C\\+\\+ compiler is installed \\(no-such\\)"):
        find_library(source, source.sets[0], tmp_path / "cache", compilers=("no-such",))


@needs_compiler
def test_a_library_of_other_source_is_compiled_anew(
    source: NativeSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = build_ahead(source, 0)
    source.main.write_text(source.main.read_text() + "// changed\n")
    assert find_library(source, source.sets[0], tmp_path / "cache").parent == tmp_path / "cache"
    assert any("was built from other source and is not used" in message for message in caplog.messages)
    with pytest.raises(BuildFailed, match="was built from other source, and no C"):
        find_library(source, source.sets[0], tmp_path / "cache", compilers=())
    assert ahead.exists()


@needs_compiler
def test_a_library_for_another_set_under_this_ones_name_is_not_used(source: NativeSource, tmp_path: Path) -> None:
    build_ahead(source, 1).rename(source.prebuilt(source.sets[0]))
    with pytest.raises(BuildFailed, match="was built from other source"):
        find_library(source, source.sets[0], tmp_path / "cache", compilers=())


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "sizes", "reason"),
    [
        (("-DWRONG=1",), {}, "a product in torch.float32 is wrong by 1"),
        ((), {"step": 7}, "its structs take \\(\\d+, 7\\) bytes, those declared in Python"),
        (("-UNAME",), {}, "the library is one for avx2"),
    ],
)
def test_a_library_that_fails_its_check_is_refused_with_the_reason(
    tmp_path: Path, flags: tuple[str, ...], sizes: dict[str, int], reason: str
) -> None:
    source = stub_source(tmp_path, [instruction_set("stub", *flags)], **sizes)
    with pytest.raises(BuildFailed, match=reason):
        load(tmp_path / "cache", source=source)


@needs_compiler
def test_the_next_best_set_is_taken_with_a_warning(tmp_path: Path) -> None:
    source = stub_source(tmp_path, [instruction_set("fast", "-DWRONG=1"), instruction_set("slow")])
    library, warnings = load(tmp_path / "cache", source=source)
    assert library.instruction_set == "slow"
    assert warnings == ("the kernels for fast are not used: a product in torch.float32 is wrong by 1",)


@needs_compiler
def test_a_set_that_the_compiler_does_not_know_gives_way_to_the_next(tmp_path: Path) -> None:
    source = stub_source(tmp_path, [instruction_set("fast", "-mno-such-thing"), instruction_set("slow")])
    library, warnings = load(tmp_path / "cache", source=source)
    assert library.instruction_set == "slow" and "no-such-thing" in warnings[0]
    check(library, "slow")


@needs_compiler
def test_a_cache_folder_that_cannot_be_used_is_named(source: NativeSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    with pytest.raises(BuildFailed, match=f"the cache folder {tmp_path / 'file'} cannot be used"):
        load(tmp_path / "file", source=source)


@needs_compiler
@pytest.mark.parametrize("what", ["the folder", "a folder above it", "the library"])
def test_code_that_somebody_else_could_have_written_is_not_loaded(
    source: NativeSource, tmp_path: Path, what: str
) -> None:
    cache = tmp_path / "above" / "cache"
    made = compile_library(source, source.sets[0], cache)
    assert compile_library(source, source.sets[0], cache) == made and cache.stat().st_mode & 0o077 == 0
    place = {"the folder": cache, "a folder above it": cache.parent, "the library": made}[what]
    place.chmod(place.stat().st_mode | 0o002)
    with pytest.raises(BuildFailed, match=r"cannot be trusted: other users may write to .*chmod go-w"):
        compile_library(source, source.sets[0], cache)
    if os.geteuid() == 0:
        place.chmod(0o700)
        os.chown(place, 65534, -1)
        with pytest.raises(BuildFailed, match="belongs to another user"):
            compile_library(source, source.sets[0], cache)
