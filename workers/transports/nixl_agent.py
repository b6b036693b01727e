"""The few calls of NIXL (NVIDIA's transfer library) that Baton makes, over UCX: registers memory, reads a peer's. Knows no pieces.

Baton builds its agents from NIXL's bindings, since the class that NIXL's Python module offers lets the progress thread poll without
a pause: half a core of an idle worker, measured. Here it sleeps until something comes in.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import numpy as np

from workers.errors import TransferFailed

MODULES = ("nixl_cu13", "nixl_cu12")
"""Wheels of the same library for different CUDA versions; without a GPU any will do."""
_WAKE_US = 100_000
"""The progress thread sleeps on its descriptors and looks up at least so often."""

Span = tuple[int, int]
"""(address, number of bytes)."""


class ReadState(Enum):
    RUNNING = auto()
    DONE = auto()
    FAILED = auto()


def installed() -> str | None:
    """The name of NIXL's module, found without importing it; None: not installed."""
    return next((name for name in MODULES if importlib.util.find_spec(name) is not None), None)


class NixlAgent:
    """One UCX agent. Its calls may block for milliseconds and may be made on any thread but the event loop's.

    Raises TransferFailed whenever NIXL raises anything.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        with _translated("cannot be started"):
            self._nixl = _bindings()
            config = self._nixl.nixlAgentConfig()
            config.useProgThread, config.pthrDelay = True, _WAKE_US
            config.useListenThread = False
            config.syncMode = self._nixl.NIXL_THREAD_SYNC_RW
            self._agent = self._nixl.nixlAgent(name, config)
            self._backend = self._agent.createBackend("UCX", {})

    def register(self, spans: Sequence[Span]) -> Any:
        """Makes this memory readable by peers, and a home for what is read; for `deregister`."""
        with _translated("cannot register memory"):
            regions = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(*span, 0, "") for span in spans])
            self._agent.registerMem(regions, [self._backend])
            return regions

    def deregister(self, regions: Any) -> None:
        with _translated("cannot deregister memory"):
            self._agent.deregisterMem(regions, [self._backend])

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent and what is registered by now."""
        with _translated("gives no metadata"):
            return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        """The peer's name."""
        with _translated("does not take a peer's metadata"):
            name = self._agent.loadRemoteMD(metadata)
            return str(name.decode() if isinstance(name, bytes) else name)

    def remove_peer(self, name: str) -> None:
        """Reads that are under way may still end, and write their homes until then."""
        with _translated("cannot remove a peer"):
            self._agent.invalidateRemoteMD(name)

    def read(self, peer: str, homes: Sequence[Span], sources: Sequence[Span]) -> int:
        """Starts to read spans of a peer's memory into ours, of the same sizes; the read's handle, for `state` and `release`."""
        with _translated("cannot read"):
            request: int = self._agent.createXferReq(
                self._nixl.NIXL_READ, self._descriptors(homes), self._descriptors(sources), peer, "", [self._backend]
            )
            try:
                self._agent.postXferReq(request, "")
            except Exception:
                self._agent.releaseXferReq(request)
                raise
            return request

    def state(self, request: int) -> ReadState:
        """Never raises: a read that NIXL cannot tell the state of has failed."""
        try:
            status = self._agent.getXferStatus(request)
        except Exception:
            return ReadState.FAILED
        if status == self._nixl.NIXL_SUCCESS:
            return ReadState.DONE
        return ReadState.RUNNING if status == self._nixl.NIXL_IN_PROG else ReadState.FAILED

    def release(self, request: int) -> None:
        """Of a read that is not running any more."""
        with contextlib.suppress(Exception):
            self._agent.releaseXferReq(request)

    def close(self) -> None:
        """Ends the agent, its threads and connections; nothing it has not written by then is written. Safe to call twice."""
        self._agent = None

    def _descriptors(self, spans: Sequence[Span]) -> Any:
        rows = np.zeros((len(spans), 3), np.uint64)
        rows[:, :2] = spans
        return self._nixl.nixlXferDList(self._nixl.DRAM_SEG, rows)


def _bindings() -> Any:
    """Raises ImportError. Both NIXL's module and UCX write their logs to standard output unless told otherwise."""
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    raises = logging.raiseExceptions
    try:
        bindings = importlib.import_module(f"{installed() or MODULES[0]}._bindings")
    finally:
        logging.raiseExceptions = raises
    theirs = logging.getLogger("nixl")
    theirs.handlers.clear()
    theirs.propagate = True
    return bindings


class _translated(contextlib.AbstractContextManager[None]):
    """NIXL raises many kinds of exceptions, none of them documented as its own."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception):
            raise TransferFailed(f"NIXL {self._what}: {error!r}") from error
