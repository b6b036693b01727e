"""Compiles a folder of C++ for this machine, once, and keeps the library in a cache folder; knows neither models nor transfers."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "c++", "clang++")
_COMPILE_TIMEOUT_S = 180.0
_LOCK_POLL_S = 0.05


class BuildFailed(Exception):
    """The library cannot be had on this machine; the message says why."""


def source_hash(source: Path) -> str:
    """Names the files of a folder; equal on every host that runs the same release."""
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


def build_library(
    main: Path, name: str, folder: Path, flags: Sequence[str], compilers: Sequence[str] = COMPILERS
) -> Path:
    """Path of the library of `main`, which includes its neighbours; compiled into `folder` if it is not there yet.

    Raises BuildFailed. Processes that start together wait for the one that compiles, but no longer than that may take.
    """
    compiler = next((found for candidate in compilers if (found := shutil.which(candidate))), None)
    if compiler is None:
        raise BuildFailed(f"no C++ compiler is installed ({', '.join(compilers)})")
    described = repr((source_hash(main.parent), compiler, tuple(flags), cpu_description()))
    library = folder / f"{name}-{hashlib.blake2b(described.encode(), digest_size=8).hexdigest()}.so"
    try:
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                _compile([compiler, *flags, str(main)], library)
    except OSError as error:
        raise BuildFailed(f"the cache folder {folder} cannot be used: {error}") from error
    return library


def cpu_description() -> str:
    """What the compiler sees of the processor: the cache folder may be shared by unlike machines. Empty when unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _compile(command: list[str], library: Path) -> None:
    started = time.monotonic()
    partial = library.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, "-o", str(partial)], capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise BuildFailed(f"{command[0]} failed: {done.stderr.strip()[:500]}")
        partial.replace(library)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{command[0]} took more than {_COMPILE_TIMEOUT_S:.0f} s") from None
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
