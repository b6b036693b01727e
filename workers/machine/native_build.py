"""Which instruction sets there are, and the library of a folder of C++ for one: built ahead, or compiled once into a cache folder; knows not what is compiled."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


__all__ = (
    "COMPILERS",
    "SHARED",
    "BuildFailed",
    "NativeSource",
    "compile_library",
    "default_cache_folder",
    "find_library",
    "not_ours_alone",
    "run_compiler",
)

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "c++", "clang++")
SHARED = ("-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-Bsymbolic")
"""A library's own names are its own, though the process may have loaded others that were compiled from the same templates."""
_COMPILE_TIMEOUT_S = 600.0
"""The kernels take a processor half a minute; a busy one takes longer."""
_LOCK_POLL_S = 0.05
_SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class BuildFailed(Exception):
    """The library cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class NativeSource:
    """A folder of C++ that becomes one library for each instruction set, all with the same C interface.

    One library for each, not one for all: what a template of the standard library becomes when it is compiled for a newer set
    would be merged with, and run instead of, what it became for an older one.
    """

    main: Path
    """The file that is compiled; it includes its neighbours and nothing else but the standard library."""
    name: str
    sets: tuple[InstructionSet, ...]
    """Best first."""
    flags: tuple[str, ...]

    @property
    def prebuilt_folder(self) -> Path:
        """Where a wheel, or an installation with a compiler, has put the libraries."""
        return self.main.parent.parent / "lib"

    def prebuilt(self, instruction_set: InstructionSet) -> Path:
        return self.prebuilt_folder / f"{self.name}-{instruction_set.name}.so"

    def hash(self) -> str:
        """Names the files of the folder and what the compiler is told; equal on every host that runs the same release."""
        told = (source_hash(self.main.parent), self.flags, [(each.name, each.flags) for each in self.sets])
        return hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()

    def label(self, instruction_set: InstructionSet) -> str:
        """What a library says it was built from, so that one of another release is known without being loaded."""
        return f"baton {self.name} {instruction_set.name} {self.hash()}"

    def compile_flags(self, instruction_set: InstructionSet) -> tuple[str, ...]:
        return (*self.flags, *instruction_set.flags, f'-DBATON_LABEL="{self.label(instruction_set)}"')


def source_hash(source: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(source.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def default_cache_folder() -> Path:
    """~/.cache/baton. Raises BuildFailed when the user has no home."""
    try:
        return Path.home() / ".cache" / "baton"
    except RuntimeError as error:
        raise BuildFailed(f"there is no folder to keep the kernels in: {error}") from error


def find_library(
    source: NativeSource, instruction_set: InstructionSet, folder: Path | None, compilers: Sequence[str] = COMPILERS
) -> Path:
    """The library built ahead from just this source, or else one that is compiled into `folder`, by default ~/.cache/baton.

    Raises BuildFailed.
    """
    ahead = source.prebuilt(instruction_set)
    if not ahead.exists():
        missing = "none was built ahead"
    elif is_built_from(ahead, source.label(instruction_set)):
        logger.info("%s for %s: built ahead: %s", source.name, instruction_set.name, ahead)
        return ahead
    else:
        missing = f"{ahead} was built from other source"
        logger.warning("%s for %s: %s and is not used", source.name, instruction_set.name, missing)
    try:
        path = compile_library(source, instruction_set, folder or default_cache_folder(), compilers)
    except BuildFailed as error:
        raise BuildFailed(f"{missing}, and {error}") from error
    logger.info("%s for %s: compiled at first use: %s", source.name, instruction_set.name, path)
    return path


def is_built_from(library: Path, label: str) -> bool:
    try:
        return label.encode() + b"\0" in library.read_bytes()
    except OSError:  # one that cannot be read cannot be loaded either
        return False


def compile_library(
    source: NativeSource,
    instruction_set: InstructionSet,
    folder: Path,
    compilers: Sequence[str] = COMPILERS,
    sanitize: bool = False,
) -> Path:
    """Path of a library in `folder`, compiled if it is not there yet. `sanitize`: with AddressSanitizer and UBSan, for tests.

    Raises BuildFailed. Processes that start together wait for the one that compiles, but no longer than that may take.
    """
    compiler = next((found for candidate in compilers if (found := shutil.which(candidate))), None)
    if compiler is None:
        raise BuildFailed(f"no C++ compiler is installed ({', '.join(compilers)})")
    flags = (*source.compile_flags(instruction_set), *(_SANITIZE if sanitize else ()))
    digest = hashlib.blake2b(repr((compiler, flags)).encode(), digest_size=8).hexdigest()
    library = folder / f"{source.name}-{instruction_set.name}-{digest}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in (folder, library):
            if reason := not_ours_alone(place):
                raise BuildFailed(reason)
        if library.exists():
            return library
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                run_compiler([compiler, *flags, str(source.main)], library)
    except OSError as error:
        raise BuildFailed(f"the cache folder {folder} cannot be used: {error}") from error
    return library


def not_ours_alone(place: Path) -> str:
    """Why what stands at `place` could be somebody else's: one who may write there, or replace a folder above it. Empty: it is as
    this user, or root, left it; or there is nothing yet.
    """
    try:
        real = place.resolve(strict=True)
    except OSError:
        return ""
    for at in (real, *real.parents):
        status = at.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{place} cannot be trusted: {at} belongs to another user"
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if at != real and (status.st_mode & stat.S_ISVTX or (others == stat.S_IWGRP and status.st_gid == os.getegid())):
            others = 0  # in a sticky folder nobody replaces what is not theirs; and a user's own group is the user
        if others:
            return f"{place} cannot be trusted: other users may write to {at}; chmod go-w it, or choose another folder"
    return ""


def run_compiler(command: Sequence[str], library: Path, timeout_s: float = _COMPILE_TIMEOUT_S) -> None:
    """Runs `command` so that `library` is there whole or not at all. Raises BuildFailed."""
    started = time.monotonic()
    partial = library.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, "-o", str(partial)], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            raise BuildFailed(f"{command[0]} failed: {done.stderr.strip()[:500]}")
        partial.replace(library)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{command[0]} took more than {timeout_s:.0f} s") from None
    finally:
        partial.unlink(missing_ok=True)
    logger.info("compiled in %.1f s: %s", time.monotonic() - started, library)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a file lock, which the kernel releases when its holder dies."""
    deadline = time.monotonic() + _COMPILE_TIMEOUT_S
    with path.open("w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildFailed(
                        f"another process holds {path} for more than {_COMPILE_TIMEOUT_S:.0f} s"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield
