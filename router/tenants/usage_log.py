"""Writes usage as lines of JSON into files of bounded size and number; and reads them again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from router.line_file import LineFile, Rotation
from router.tenants.config import UsageConfig
from router.tenants.usage import Usage, usage_of
from workers.errors import InvalidConfig

PREFIX = "usage-"


class UsageLog:
    """Of one router. Raises InvalidConfig when the folder or the file cannot be made."""

    def __init__(self, config: UsageConfig, router_id: str) -> None:
        path = os.path.join(config.folder, f"{PREFIX}{router_id}.jsonl")
        try:
            os.makedirs(config.folder, mode=0o700, exist_ok=True)
            self._lines = LineFile(path, "usage", Rotation(config.max_bytes, config.max_files))
        except OSError as error:
            raise InvalidConfig(
                f"router.tenants.usage.folder {config.folder!r} cannot be made or written: {error.strerror}"
            ) from error

    @property
    def num_lost(self) -> int:
        """Lines that the disk did not take."""
        return self._lines.num_lost

    def write(self, usage: Usage) -> None:
        """Soon; does not wait."""
        self._lines.write(usage.line())

    def close(self) -> None:
        """When all is written, or the disk has not taken it in time."""
        self._lines.close()


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
