"""How long each engine takes to load a model: from the disk, and again; beside plainly reading the same files.

Baton may keep packed weights in its cache folder and map them the next time: it starts without them here, but with its kernels
compiled, and finds what it kept the second time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gguf_files import model_path
from worker_process import Program, WorkerFailed, WorkerProcess

CHUNK_BYTES = 16 << 20

Loads = dict[str, dict[str, float]]
"""{engine: {"cold load, s", "second load, s", "cold read, s"}}"""


def measure_loads(
    programs: Sequence[Program],
    num_threads: int,
    folder: Path,
    baton_cache: Path,
    say: Callable[[str], None],
    failures: list[str],
) -> Loads:
    """Each load in a process of its own. `baton_cache` is Baton's cache folder."""
    loads: Loads = {}
    keep_only_kernels(baton_cache)
    for program in programs:
        if program.engine == "continuous":  # it loads as the other transformers engine does
            continue
        say(f"loading twice in {program.engine}")
        try:
            path = model_path(program, folder, "bfloat16")
            files = weight_files(path)
            forget(files)
            read_s = read_once(files)
            forget(files)
            cold_s, second_s = (_load_s(program, path, num_threads, folder.parent) for _ in range(2))
            loads[program.engine] = {"cold read, s": read_s, "cold load, s": cold_s, "second load, s": second_s}
        except WorkerFailed as error:
            failures.append(f"{program.engine} loads: {error}")
    return loads


def weight_files(path: Path) -> list[Path]:
    """The files that hold weights: the path itself, or those of a checkpoint folder."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def keep_only_kernels(baton_cache: Path) -> None:
    """Deletes whatever Baton keeps besides compiled libraries and their locks."""
    for path in [path for path in baton_cache.rglob("*") if path.is_file()]:
        if path.suffix not in (".so", ".lock"):
            path.unlink()


def forget(files: Sequence[Path]) -> None:
    """Drops the files' pages from the page cache; a host below a virtual machine may keep them all the same."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # dirty pages would stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(files: Sequence[Path]) -> float:
    """Seconds to read the files from end to end in large pieces, one after another."""
    buffer = bytearray(CHUNK_BYTES)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def _load_s(program: Program, path: Path, num_threads: int, logs: Path) -> float:
    with WorkerProcess(program, logs) as worker:
        seconds: float = worker.ask("load", path=str(path), dtype="bfloat16", num_threads=num_threads)["load_s"]
        return seconds
