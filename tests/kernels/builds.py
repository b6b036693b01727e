"""Builds the kernels' driver (driver.cpp) for a processor, real or emulated, and runs it; installs nothing."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from workers.machine.native_build import default_cache_folder
from workers.model.native.build import supported

_HERE = Path(__file__).parent
_SOURCE = _HERE.parents[1] / "workers" / "model" / "native" / "source"
_FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-Wno-psabi", f"-I{_SOURCE}", f"-I{_HERE}")
_SANITIZE = (
    "-O0",  # the compiler takes minutes to optimize what sanitizers add
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    # What ASan sees anyway.
    "-fno-sanitize=null,alignment,vptr,object-size",
    "--param",
    "asan-instrumentation-with-call-threshold=0",
)
_TIMEOUT_S = 600.0
_MAX_KEPT = 3
"""Drivers of one build that stay: those of the last sources."""
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_CROSS_COMPILER = "aarch64-linux-gnu-g++"
_QEMU = ("qemu-aarch64-static", "qemu-aarch64")  # as the processor "max", which has all that qemu knows


class Missing(Exception):
    """What a build or a run needs is not on this machine; the message names it."""


@dataclass(frozen=True, slots=True)
class Build:
    """A driver: what it is compiled for and by, and what runs it where that is not this machine."""

    name: str
    flags: tuple[str, ...]
    compilers: tuple[str, ...] = ("g++",)
    runners: tuple[str, ...] = ()

    def compile(self) -> Path:
        """The driver, in a folder that outlives the run: nothing is compiled twice from one source. Raises Missing."""
        compiler = _found(self.compilers)
        command = [compiler, *_FLAGS, *self.flags, str(_HERE / "driver.cpp")]
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
        digest = hashlib.blake2b(version + "\0".join(command).encode(), digest_size=8)
        for path in sorted(path for folder in (_SOURCE, _HERE) for path in folder.glob("*.*") if path.suffix != ".py"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        folder = default_cache_folder() / "test-drivers"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        driver = folder / f"{self.name}-{digest.hexdigest()}"
        if not driver.exists():
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                made = Path(fresh, self.name)
                subprocess.run([*command, "-o", str(made)], check=True, timeout=_TIMEOUT_S)
                made.replace(driver)
            for former in sorted(folder.glob(f"{self.name}-*"), key=lambda path: path.stat().st_mtime)[:-_MAX_KEPT]:
                former.unlink(missing_ok=True)
        return driver

    def run(self, driver: Path, *arguments: str) -> list[str]:
        """The lines that it prints. Raises Missing, and AssertionError when it fails."""
        command = [*([_found(self.runners)] if self.runners else []), str(driver), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and lines and lines[-1] == "passed", done.stdout + done.stderr[-4000:]
        return lines[:-1]


def by_case(lines: list[str]) -> dict[str, str]:
    """What the driver printed of each model, type and arithmetic: all builds that name the same must agree."""
    split = (line.rpartition(" hidden=") if " hidden=" in line else line.partition(" ") for line in lines)
    return {case: hashes for case, _, hashes in split}


def native() -> list[Build]:
    """One for each instruction set of this processor, best first. Raises Missing when it has none."""
    sets = supported()
    if not sets:
        raise Missing("AVX2 with FMA or NEON")
    return [Build(each.name, each.flags) for each in sets]


def sanitized() -> Build:
    """The plainest set of this processor, with AddressSanitizer and UBSan."""
    plain = min(native(), key=lambda build: len(build.flags))
    return Build(f"{plain.name}-sanitized", (*plain.flags, *_SANITIZE))


EMULATED = {
    "avx512": Build("avx512-emulated", (*_AVX2, "-DBATON_EMULATE_AVX512")),
    "avx512bf16": Build("avx512bf16-emulated", (*_AVX2, "-DBATON_EMULATE_AVX512", "-DBATON_EMULATE_AVX512BF16")),
    "amx": Build(
        "amx-emulated",
        (*_AVX2, "-DBATON_EMULATE_AVX512", "-DBATON_EMULATE_AVX512BF16", "-DBATON_EMULATE_AMX"),
    ),
    "neon": Build("neon-emulated", ("-march=armv8.2-a", "-static"), (_CROSS_COMPILER,), _QEMU),
    "neonbf16": Build("neonbf16-emulated", ("-march=armv8.2-a+bf16", "-static"), (_CROSS_COMPILER,), _QEMU),
}
"""Sets that this processor need not have: AVX-512 by emulated.h on AVX2, NEON by qemu-user."""


def _found(programs: tuple[str, ...]) -> str:
    for program in programs:
        if found := shutil.which(program):
            return found
    raise Missing(" or ".join(programs))
