"""Writes usage as lines of JSON on a thread of its own, into files of bounded size and number; and reads them again.

A disk that is full, slow or gone costs lines, which are counted, and nothing else.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

from router.tenants.config import UsageConfig
from router.tenants.usage import Usage, usage_of
from workers.errors import InvalidConfig

log = logging.getLogger(__name__)

MAX_WAITING = 8192
"""Lines that wait to be written."""
PREFIX = "usage-"


class UsageLog:
    """Of one router. Raises InvalidConfig when the folder cannot be made."""

    def __init__(self, config: UsageConfig, router_id: str) -> None:
        try:
            os.makedirs(config.folder, mode=0o700, exist_ok=True)
        except OSError as error:
            raise InvalidConfig(
                f"router.tenants.usage.folder {config.folder!r} cannot be made: {error.strerror}"
            ) from error
        self.num_lost = 0
        path = os.path.join(config.folder, f"{PREFIX}{router_id}.jsonl")
        self._waiting: queue.Queue[Any] = queue.Queue(MAX_WAITING)
        self._file = _PrivateFile(self, path, config)
        self._listener = QueueListener(self._waiting, self._file)
        self._listener.start()

    def write(self, usage: Usage) -> None:
        """Soon; does not wait."""
        try:
            self._waiting.put_nowait(logging.makeLogRecord({"msg": usage.line()}))
        except queue.Full:
            self.lose("lines come faster than the disk takes them")

    def lose(self, why: str) -> None:
        """A line is not written; the first one is named in the log."""
        self.num_lost += 1
        if self.num_lost == 1:
            log.warning("usage is not written, and only counted: %s", why)

    def close(self) -> None:
        """When all is written, or the disk has refused it."""
        self._listener.stop()
        with suppress(OSError):
            self._file.close()


class _PrivateFile(RotatingFileHandler):
    """Only this user may read it."""

    def __init__(self, owner: UsageLog, path: str, config: UsageConfig) -> None:
        self._owner = owner
        super().__init__(
            path, maxBytes=config.max_bytes, backupCount=config.max_files - 1, encoding="utf-8", delay=True
        )

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(open(self.baseFilename, "ab", opener=_open_private), encoding="utf-8")

    def doRollover(self) -> None:
        if self.backupCount:
            super().doRollover()
        else:  # the standard handler would go on with the same file
            if self.stream:
                self.stream.close()
            os.truncate(self.baseFilename, 0)
            self.stream = self._open()

    def handleError(self, record: logging.LogRecord) -> None:
        self._owner.lose(str(sys.exception()))
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):  # the next line tries anew
                stream.close()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_usage(folder: Path, since_s: float) -> Iterator[Usage]:
    """What all routers have written there since a time (since 1970), oldest files first. Raises InvalidConfig when there is no such folder."""
    try:
        paths = sorted(folder.glob(f"{PREFIX}*.jsonl*"), key=lambda path: path.stat().st_mtime)
    except OSError as error:
        raise InvalidConfig(f"the usage in {folder} cannot be read: {error.strerror}") from error
    for path in paths:
        try:
            if path.stat().st_mtime < since_s:
                continue
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    usage = usage_of(line)
                    if usage is not None and usage.ended_s >= since_s:
                        yield usage
        except FileNotFoundError:  # it was the oldest, and is gone
            continue
