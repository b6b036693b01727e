"""How far this process has come with reading its checkpoint, for whoever waits: bytes and layers. Knows no files and no tensors."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable

from workers.status import LoadProgress

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class ReadProgress:
    """Of one checkpoint. Any thread may add to it, and ask."""

    def __init__(self, names: Iterable[str], num_bytes: int) -> None:
        self._lock = threading.Lock()
        self._num_bytes, self._num_read = num_bytes, 0
        self._num_layers = len({layer for name in names if (layer := _layer_of(name)) is not None})
        self._begun: set[int] = set()

    def begin(self, name: str) -> None:
        """A tensor is being read, or known to be somebody else's."""
        layer = _layer_of(name)
        if layer is not None and layer not in self._begun:
            with self._lock:
                self._begun.add(layer)

    def read(self, num_bytes: int) -> None:
        with self._lock:
            self._num_read += num_bytes

    def leave_out(self, num_bytes: int) -> None:
        """These are other ranks'."""
        with self._lock:
            self._num_bytes -= num_bytes

    def now(self) -> LoadProgress:
        with self._lock:
            total = max(self._num_bytes, self._num_read)
            return LoadProgress(self._num_read, total, len(self._begun), self._num_layers)


_last: ReadProgress | None = None


def follow(progress: ReadProgress) -> None:
    """`loading` tells of this one from now on: a process loads one model."""
    global _last
    _last = progress


def loading() -> LoadProgress:
    """How far this process has come; zeros before it has found its checkpoint."""
    return _last.now() if _last is not None else LoadProgress()


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None
