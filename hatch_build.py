"""Compiles the C++ libraries ahead of time: for every instruction set into a wheel, for this processor's into an editable installation.

Without a C++ compiler, pip must find ziglang, which compiles; with BATON_COMPILER=none, or on other systems than Linux, the wheel holds Python only and says so.
BATON_COMPILER chooses: a compiler's path, `zig`, or `none`. What is named there and fails ends the build.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from workers.kv_memory.native.build import CHECKSUM  # noqa: E402
from workers.machine.native_build import COMPILERS, BuildFailed, InstructionSet, NativeSource, run_compiler, supported  # noqa: E402  # noqa: E402
from workers.model.native.build import KERNELS  # noqa: E402

SOURCES = (KERNELS, CHECKSUM)
MACHINES = ("x86_64", "aarch64")
ZIG = "ziglang>=0.14"
_ZIG_GLIBC = "2.28"
"""The oldest that torch's own wheels run on."""
_ZIG_SPELLS = {
    "-march=armv8.2-a": "-mcpu=generic+v8_2a",
    "-march=armv8.2-a+bf16": "-mcpu=generic+v8_2a+bf16",
}
_NAMED = "BATON_COMPILER"
_TIMEOUT_S = 1800.0
"""A busy machine may be slow; nobody waits for a library here as a starting worker does."""
_GLIBC = re.compile(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)")
# Nothing of the C++ library is shared with the process, whose version of it may be older than the compiler's.
_OWN_LIBRARIES = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s")


class Compiler(NamedTuple):
    command: tuple[str, ...]
    flags: tuple[str, ...]
    spelled: dict[str, str]
    """Flags that it wants in other words."""


class LibrariesHook(BuildHookInterface[Any]):
    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What the builder must install first: a compiler, where there is none."""
        named = os.environ.get(_NAMED, "")
        if not _is_known_platform() or named not in ("", "zig"):
            return []
        return [ZIG] if named == "zig" or find_compiler() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        named = os.environ.get(_NAMED, "")
        if named == "none" or not _is_known_platform():
            self._say_that_it_is_pure(
                f"{_NAMED} is none" if named == "none" else f"no C++ is made for {platform.platform()}"
            )
            return
        compiler = find_compiler()
        if compiler is None:
            if named:
                raise BuildFailed(f"{_NAMED} is {named!r}, which is not there")
            self._say_that_it_is_pure("there is no C++ compiler here, and no ziglang")
            return
        if version == "editable":
            self._compile(compiler, None, only_supported=True, is_required=bool(named))
            return
        self._folder = tempfile.TemporaryDirectory(prefix="baton-libraries-")
        libraries = self._compile(compiler, Path(self._folder.name), only_supported=False, is_required=bool(named))
        if not libraries:
            return
        for library, place in libraries.items():
            build_data["force_include"][str(library)] = str(place.relative_to(ROOT))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(list(libraries))}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if (folder := getattr(self, "_folder", None)) is not None:
            folder.cleanup()

    def _compile(
        self, compiler: Compiler, folder: Path | None, only_supported: bool, is_required: bool
    ) -> dict[Path, Path]:
        """The libraries that could be made, in `folder` or else where they belong, with the place where they belong."""

        def compile_one(source: NativeSource, instruction_set: InstructionSet) -> tuple[Path, Path] | BuildFailed:
            place = source.prebuilt(instruction_set)
            library = place if folder is None else folder / place.name
            flags = [compiler.spelled.get(flag, flag) for flag in source.compile_flags(instruction_set)]
            try:
                library.parent.mkdir(parents=True, exist_ok=True)
                run_compiler([*compiler.command, *flags, *compiler.flags, str(source.main)], library, _TIMEOUT_S)
            except BuildFailed as error:
                return error
            except OSError as error:  # such as a source tree that may not be written to
                return BuildFailed(str(error))
            return library, place

        pairs = [
            (source, each)
            for source in SOURCES
            for each in (supported(source.sets) if only_supported else source.sets)
            if each.machine == platform.machine()
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            made = list(threads.map(lambda pair: compile_one(*pair), pairs))
        found: dict[Path, Path] = {}
        for (source, each), outcome in zip(pairs, made, strict=True):
            if isinstance(outcome, BuildFailed):
                if is_required:
                    raise outcome
                self.app.display_warning(f"baton-serve: no {source.name} for {each.name}: {outcome}")
            else:
                found[outcome[0]] = outcome[1]
        if found:
            names = ", ".join(sorted(path.stem for path in found))
            self.app.display_info(f"baton-serve: compiled {names} with {' '.join(compiler.command)}")
        else:
            self._say_that_it_is_pure("nothing could be compiled")
        return found

    def _say_that_it_is_pure(self, reason: str) -> None:
        self.app.display_warning(
            f"baton-serve: NO C++ LIBRARIES ARE BUILT ({reason}). Workers compile them at their first start where there is "
            "a compiler, and compute with PyTorch, several times slower, where there is none."
        )


def _is_known_platform() -> bool:
    return sys.platform == "linux" and platform.machine() in MACHINES


def find_compiler() -> Compiler | None:
    """The one that BATON_COMPILER names, else the system's, else ziglang where it is installed."""
    named = os.environ.get(_NAMED, "")
    names = () if named == "zig" else (named,) if named else COMPILERS
    for name in names:
        if found := shutil.which(name):
            return Compiler((found,), _OWN_LIBRARIES if _has_static_library(found) else ("-s",), {})
    if named in ("", "zig") and find_spec("ziglang") is not None:
        target = f"{platform.machine()}-linux-gnu.{_ZIG_GLIBC}"
        return Compiler((sys.executable, "-m", "ziglang", "c++"), ("-target", target, "-s"), _ZIG_SPELLS)
    return None


def _has_static_library(compiler: str) -> bool:
    """Some distributions keep libstdc++.a in a package of its own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_compiler([compiler, *_OWN_LIBRARIES, "-shared", "-x", "c++", os.devnull], Path(folder) / "empty.so")
        except BuildFailed:
            return False
    return True


def platform_tag(libraries: list[Path]) -> str:
    """The manylinux tag (PEP 600) of the newest glibc that the libraries name.

    linux_* where none names glibc, or one needs the C++ library of the machine that it runs on.
    """
    contents = [library.read_bytes() for library in libraries]
    found = [needed for content in contents if (needed := needed_glibc(content)) is not None]
    if not found or any(b"\0libstdc++.so" in content for content in contents):
        return f"linux_{platform.machine()}"
    major, minor = max((*found, (2, 17)))
    return f"manylinux_{major}_{minor}_{platform.machine()}"


def needed_glibc(library: bytes) -> tuple[int, int] | None:
    """The newest version among the names GLIBC_x.y that a library holds; ELF keeps those it needs in its table of names."""
    return max(((int(major), int(minor)) for major, minor in _GLIBC.findall(library)), default=None)
