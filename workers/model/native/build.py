"""Compiles the kernels for this machine, once, and keeps the library in a cache folder; knows no model."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "source"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
"""No contraction: which products are fused with a sum is written in the source, not left to the compiler."""
_COMPILERS = ("g++", "c++", "clang++")
_COMPILE_TIMEOUT_S = 180.0
_LOCK_POLL_S = 0.05


class BuildFailed(Exception):
    """The kernels cannot be had on this machine; the message says why."""


def source_hash() -> str:
    """Names the kernels' source; equal on every host that runs the same release."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(_SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def default_cache_folder() -> Path:
    """~/.cache/baton. Raises BuildFailed when the user has no home."""
    try:
        return Path.home() / ".cache" / "baton"
    except RuntimeError as error:
        raise BuildFailed(f"there is no folder to keep the kernels in: {error}") from error


def build(folder: Path, compilers: tuple[str, ...] = _COMPILERS) -> Path:
    """The library's path in `folder`, compiled if it is not there yet. Raises BuildFailed.

    Processes that start together wait for the one that compiles, but no longer than a compilation may take.
    """
    cpu = _cpu()
    if "avx512f" not in cpu:
        raise BuildFailed("the processor has no AVX-512")
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildFailed(f"no C++ compiler is installed ({', '.join(compilers)})")
    key = hashlib.blake2b(repr((source_hash(), compiler, _FLAGS, cpu)).encode(), digest_size=8).hexdigest()
    library = folder / f"kernels-{key}.so"
    try:
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                _compile(compiler, library)
    except OSError as error:
        raise BuildFailed(f"the cache folder {folder} cannot be used: {error}") from error
    return library


def _compile(compiler: str, library: Path) -> None:
    started = time.monotonic()
    partial = library.with_suffix(f".{os.getpid()}")
    command = [compiler, *_FLAGS, str(_SOURCE / "baton.cpp"), "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise BuildFailed(f"{compiler} failed: {done.stderr.strip()[:500]}")
        partial.replace(library)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{compiler} took more than {_COMPILE_TIMEOUT_S:.0f} s") from None
    finally:
        partial.unlink(missing_ok=True)
    logger.info("compiled the kernels in %.1f s: %s", time.monotonic() - started, library)


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


def _cpu() -> str:
    """What the compiler sees of the processor: the cache folder may be shared by unlike machines. Empty when unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
