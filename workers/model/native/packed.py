"""Keeps packed weights in files, so that the next start copies them instead of packing; knows no model, only runs of bytes.

They are copied into memory of the process rather than mapped: huge pages are worth more than what the copy costs, and
each piece is checked against its checksum when it has been copied, so that what computes is what was checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from workers.model.checkpoint.progress import ReadProgress, follow

_MAX_THREADS = 8
"""More wait for memory, and each holds a piece of its own."""


def run_all(jobs: Sequence[Callable[[], None]], num_threads: int) -> None:
    """Returns when all are done. Raises what the first one that failed raised; what has not begun by then never does.

    The threads run on the processors of the calling one.
    """
    if num_threads == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(min(num_threads, _MAX_THREADS), "load", torch.set_num_threads, (1,)) as threads:
        running = [threads.submit(job) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


logger = logging.getLogger(__name__)

_VERSION = 1
_MAGIC = b"BATONPKD"
_PREFIX = struct.Struct("<8sQQ")
"""Magic, bytes of the JSON that follows, and its checksum."""
_PAGE = 4096
_PIECE_BYTES = 4 << 20
_SUFFIX = ".packed"
_WORTH_BYTES = 64 << 20
"""Smaller models are packed as fast as their file is opened."""


class _Unusable(Exception):
    """The file is not what was written for this model; the message says in what way."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """The file of one model's packed weights in `folder`, where such files take at most `limit_bytes` together.

    `facts` name all that the bytes depend on: checkpoint, type, kernels, processor's layout.
    """

    folder: Path
    limit_bytes: int
    facts: tuple[str, ...]
    num_threads: int = 1
    worth_bytes: int = _WORTH_BYTES

    @property
    def path(self) -> Path:
        key = hashlib.blake2b(repr((_VERSION, self.facts)).encode(), digest_size=16).hexdigest()
        return self.folder / f"weights-{key}{_SUFFIX}"

    def read(self, runs: Sequence[memoryview]) -> bool:
        """Fills the runs; False when there is no such file or it is damaged, and then every byte is zero.

        A file that cannot be used is deleted.
        """
        started = time.monotonic()
        try:
            with self.path.open("rb", buffering=0) as stream:
                self._read(stream.fileno(), runs)
                with suppress(OSError):  # in a folder of another user, or a read-only one, nothing is kept by age
                    os.utime(stream.fileno())  # what was used last is kept longest
        except FileNotFoundError:
            return False
        except (OSError, _Unusable) as error:
            logger.warning("packing the weights anew, as %s cannot be used: %s", self.path, error)
            _remove(self.path)
            for run in runs:
                run[:] = bytes(len(run))
            return False
        logger.info("read packed weights in %.2f s: %s", time.monotonic() - started, self.path)
        return True

    def write(self, runs: Sequence[memoryview], must_stop: Callable[[], bool] = lambda: False) -> bool:
        """Keeps the runs; False, and a line in the log, when that was not possible.

        At most one process writes into the folder; who comes meanwhile leaves it. `must_stop` is asked between pieces.
        """
        size = sum(len(run) for run in runs)
        if not self.worth_bytes <= size <= self.limit_bytes:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "weights.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self.path.exists() or self._write(runs, size, must_stop)
        except BlockingIOError:
            logger.info("another process writes packed weights into %s", self.folder)
        except OSError as error:
            logger.warning("packed weights are not kept, so the next start packs them again: %s", error)
        return False

    def write_later(self, runs: Sequence[memoryview], owner: object) -> threading.Thread:
        """The same on a thread of its own, which keeps the owner of the memory alive; given up when the program ends."""

        def write(owner: object) -> None:
            self.write(runs, lambda: not threading.main_thread().is_alive())

        thread = threading.Thread(target=write, args=(owner,), name="packed-weights")
        thread.start()
        return thread

    def _read(self, file: int, runs: Sequence[memoryview]) -> None:
        header, start = _read_header(file)
        pieces = tuple(_pieces(runs, start))
        if header.get("facts") != list(self.facts) or header.get("runs") != [len(run) for run in runs]:
            raise _Unusable("it holds other weights")
        checksums = header["checksums"]
        end = pieces[-1][0] + len(pieces[-1][1]) if pieces else start
        if len(checksums) != len(pieces) or os.fstat(file).st_size != end:
            raise _Unusable("it has another size")
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        progress = ReadProgress((), sum(len(piece) for _, piece in pieces))
        follow(progress)
        jobs = [
            partial(_copy, file, at, piece, expected, progress)
            for (at, piece), expected in zip(pieces, checksums, strict=True)
        ]
        run_all(jobs, self.num_threads)

    def _write(self, runs: Sequence[memoryview], size: int, must_stop: Callable[[], bool]) -> bool:
        started = time.monotonic()
        for left in self.folder.glob(f"*{_SUFFIX}.partial"):  # by a writer that was killed: the lock is ours
            _remove(left)
        self._make_room(size)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            logger.warning("packed weights are not kept: %s has %d MiB free", self.folder, free >> 20)
            return False
        checksums: list[int] = []
        for _, piece in _pieces(runs, 0):
            if must_stop():
                return False
            checksums.append(xxhash.xxh3_64_intdigest(piece))
        header = {"facts": self.facts, "runs": [len(run) for run in runs], "checksums": checksums}
        text = json.dumps(header).encode()
        text += b" " * (-(_PREFIX.size + len(text)) % _PAGE)
        partial_path = self.path.with_suffix(f"{_SUFFIX}.partial")
        try:
            with partial_path.open("wb", buffering=0) as stream:
                _write_all(
                    stream.fileno(), memoryview(_PREFIX.pack(_MAGIC, len(text), xxhash.xxh3_64_intdigest(text)) + text)
                )
                for _, piece in _pieces(runs, 0):
                    if must_stop():
                        return False
                    _write_all(stream.fileno(), piece)
                os.fsync(stream.fileno())
            partial_path.replace(self.path)
        finally:
            partial_path.unlink(missing_ok=True)
        logger.info("kept packed weights in %.2f s: %s", time.monotonic() - started, self.path)
        return True

    def _make_room(self, size: int) -> None:
        """Deletes the files that were not used for longest until `size` more bytes are within the limit."""
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob(f"*{_SUFFIX}"))
        kept = sum(each for _, each, _ in files)
        for _, each, path in files:
            if kept + size <= self.limit_bytes:
                break
            _remove(path)
            kept -= each


def _pieces(runs: Sequence[memoryview], start: int) -> Iterator[tuple[int, memoryview]]:
    """Where each piece lies in the file, and its memory: the runs follow each other."""
    for run in runs:
        for first in range(0, len(run), _PIECE_BYTES):
            piece = run[first : first + _PIECE_BYTES]
            yield start, piece
            start += len(piece)


def _read_header(file: int) -> tuple[dict[str, Any], int]:
    """What the file says of itself, and where its data begins."""
    prefix = os.pread(file, _PREFIX.size, 0)
    if len(prefix) != _PREFIX.size:
        raise _Unusable("it has no header")
    magic, size, checksum = _PREFIX.unpack(prefix)
    if magic != _MAGIC or size > os.fstat(file).st_size:
        raise _Unusable("it is no file of packed weights")
    text = os.pread(file, size, _PREFIX.size)
    if len(text) != size or xxhash.xxh3_64_intdigest(text) != checksum:
        raise _Unusable("its header is damaged")
    header: dict[str, Any] = json.loads(text)
    return header, _PREFIX.size + size


def _copy(file: int, at: int, piece: memoryview, expected: int, progress: ReadProgress) -> None:
    view = piece
    while len(view):
        num_read = os.preadv(file, [view], at)
        if not num_read:
            raise _Unusable("it ends early")
        view, at = view[num_read:], at + num_read
        progress.read(num_read)
    if xxhash.xxh3_64_intdigest(piece) != expected:
        raise _Unusable("a checksum differs")


def _write_all(file: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(file, view) :]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", path, error)
