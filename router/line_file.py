"""Appends lines to a file from a thread of its own, so that a slow, full or hung disk costs lines, which are counted, and nothing else."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

log = logging.getLogger(__name__)

MAX_WAITING = 8192
"""Lines; what comes while so many wait for the disk is counted, and left out."""
CLOSE_S = 5.0
"""How long a file is waited for in the end."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """A file that would grow beyond `max_bytes` becomes `.1`, that one `.2`, and so on; of all there are at most `max_files`."""

    max_bytes: int
    max_files: int


class LineFile:
    """Without `rotation` others may move the file away, as logrotate does: it is made anew. With it only this user may read it."""

    def __init__(self, path: str, what: str, rotation: Rotation | None = None) -> None:
        """Empty path: standard error. `what` names the lines in the log. Raises OSError when the file cannot be opened."""
        self._path = path
        self._what = what
        self._rotation = rotation
        self._file: TextIO | None = self._open() if path else sys.stderr
        self._waiting: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._num_untold = 0
        """Lines that were lost since one was written."""
        self.num_lost = 0
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Soon; does not wait."""
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._lose("lines come faster than the disk takes them")

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Waits until what waits is written, but not long for a disk that takes nothing: what it does not take then is lost."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=timeout_s / 2)
        self._thread.join(timeout_s / 2)
        if self._thread.is_alive():
            log.warning("%s: %d lines are not written, since the disk takes nothing", self._what, self._waiting.qsize())

    def _lose(self, why: str) -> None:
        with self._lock:
            self.num_lost += 1
            self._num_untold += 1
            is_first = self.num_lost == 1
        if is_first:
            log.warning("%s: lines are not written, and only counted: %s", self._what, why)

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._append(line)
            except (OSError, ValueError) as error:
                self._lose(str(error))
                self._drop()
        self._drop()

    def _append(self, line: str) -> None:
        """Raises OSError, and ValueError for a file that was closed by somebody else."""
        with self._lock:
            lost, self._num_untold = self._num_untold, 0
        try:
            text = f"{json.dumps({'lost_lines': lost, 'status': 0})}\n{line}\n" if lost else f"{line}\n"
            file = self._ready(len(text.encode(errors="replace")))
            file.write(text)
            if self._waiting.empty() or self._rotation is not None:
                file.flush()
        except BaseException:
            with self._lock:
                self._num_untold += lost
            raise

    def _ready(self, num_bytes: int) -> TextIO:
        """The file, with room for so many bytes."""
        if self._file is None:
            self._file = self._open()
        if not self._path:
            return self._file
        if self._rotation is None:
            if not self._is_there(self._file):
                self._drop()
                self._file = self._open()
        elif (held := os.fstat(self._file.fileno()).st_size) and held + num_bytes > self._rotation.max_bytes:
            self._drop()
            self._move(self._rotation.max_files)
            self._file = self._open()
        return self._file

    def _is_there(self, file: TextIO) -> bool:
        with suppress(FileNotFoundError):
            there, own = os.stat(self._path), os.fstat(file.fileno())
            return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
        return False

    def _move(self, max_files: int) -> None:
        """Makes place for a new file; the oldest is gone then."""
        if max_files == 1:
            os.unlink(self._path)
        for number in range(max_files - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(f"{self._path}.{number - 1}" if number > 1 else self._path, f"{self._path}.{number}")

    def _open(self) -> TextIO:
        opener = None if self._rotation is None else _open_private
        return open(self._path, "a", encoding="utf-8", errors="replace", opener=opener)

    def _drop(self) -> None:
        """The next line opens it anew."""
        file, self._file = self._file, None if self._path else sys.stderr
        with suppress(OSError, ValueError):
            if file is not None and self._path:
                file.close()
            elif file is not None:
                file.flush()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
