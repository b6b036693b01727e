"""Says when the disk that holds a cluster's files is full, and when there is room again: what processes would write is lost meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

LOOK_S = 2.0
LOW_BYTES = 16 << 20
ENOUGH_BYTES = 2 * LOW_BYTES


class Room:
    """What was said last of one folder's disk."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._is_low = False

    def look(self, free_bytes: int) -> str:
        """One sentence when that has changed; otherwise empty."""
        if self._is_low == (free_bytes < (ENOUGH_BYTES if self._is_low else LOW_BYTES)):
            return ""
        self._is_low = not self._is_low
        if self._is_low:
            left = f"{free_bytes >> 20} MiB left"
            return f"the disk that holds {self._folder} is full ({left}): requests are served, logs are lost; make room"
        return f"the disk that holds {self._folder} has room again"


async def watch_room(folder: str, say: Callable[[str], None]) -> NoReturn:
    """Looks every LOOK_S. Cancel it."""
    room = Room(folder)
    while True:
        with suppress(OSError):
            disk = os.statvfs(folder)
            if sentence := room.look(disk.f_bavail * disk.f_frsize):
                say(sentence)
        await asyncio.sleep(LOOK_S)
