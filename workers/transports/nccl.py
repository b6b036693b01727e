"""KV from one GPU's pool into another's over NCCL, negotiated as Gloo is. Not run on a GPU yet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvMemory
from workers.status import WorkerAddress
from workers.transports.collective import GlooTransport
from workers.transports.contract import View
from workers.transports.pair_group import PairGroup

_dist: Any = torch.distributed
_cuda: Any = torch.cuda
_POLL_S = 50e-6
_MAX_CHANNELS = 4
"""Channels of a pair: each takes a streaming multiprocessor from the model while KV moves."""


def is_usable(memory: KvMemory) -> bool:
    """Whether this process has a pool on a GPU, and NCCL."""
    return memory.device_address != 0 and torch.cuda.is_available() and _dist.is_nccl_available()


class NcclPair:
    """A 2-rank communicator with a stream of its own. What is sent was announced, so it is final on the device."""

    def __init__(self, store: Any, prefix: str, rank: int, memory: KvMemory, timeout_s: float) -> None:
        self._memory = memory
        self._bytes: torch.Tensor = memory.device_bytes  # type: ignore[attr-defined]  # StagedKvMemory has it
        self._peer = 1 - rank
        self._timeout_s = timeout_s
        self._scratch: torch.Tensor | None = None
        try:
            self._stream = _cuda.Stream(device=self._bytes.device)
            options = _dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=timeout_s)
            options.config.max_ctas = _MAX_CHANNELS
            self._group = _dist.ProcessGroupNCCL(_dist.PrefixStore(prefix, store), rank, 2, options)
        except RuntimeError as error:
            raise TransferFailed(f"the pair cannot be made: {error}") from error

    def send(self, views: Sequence[View]) -> None:
        self._move([self._on_device(view) for view in views], self._group.send)

    def receive(self, homes: Sequence[View]) -> Iterator[View]:
        """Also copies to the host's mirror, where checksums are verified."""
        tensors = [self._on_device(home) for home in homes]
        self._move(tensors, self._group.recv)
        for home, tensor in zip(homes, tensors, strict=True):
            torch.from_numpy(home).copy_(tensor)
            yield home

    def abort(self) -> None:
        self._group.abort()

    def _on_device(self, view: View) -> torch.Tensor:
        """The same bytes of the device's pool; scratch for a piece that nobody wants."""
        first = view.ctypes.data - self._memory.bytes.ctypes.data
        if 0 <= first <= self._memory.bytes.nbytes - view.nbytes:
            return self._bytes[first : first + view.nbytes]
        if self._scratch is None:
            self._scratch = torch.empty(self._memory.layout.block_bytes, dtype=torch.uint8, device=self._bytes.device)
        return self._scratch[: view.nbytes]

    def _move(self, tensors: Sequence[torch.Tensor], call: Any) -> None:
        try:
            with _cuda.stream(self._stream):
                for work in [call([tensor], self._peer, 0) for tensor in tensors]:
                    work.wait()  # makes our stream wait for NCCL's, not this thread
                done = _cuda.Event()
                done.record(self._stream)
            deadline = time.monotonic() + self._timeout_s
            while not done.query():
                if time.monotonic() > deadline:
                    self.abort()
                    raise TransferFailed("NCCL made no progress")
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise TransferFailed(f"the pair broke: {error}") from error


class NcclTransport(GlooTransport):
    """Offered only by a worker whose pool is on a GPU. Two workers that share one GPU cannot make a pair; they have cuda_ipc."""

    name = "nccl"

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        return super().offer(target, host) if is_usable(self.memory) else None

    def make_pair(self, store: Any, session: bytes, rank: int) -> PairGroup:
        return NcclPair(store, session.hex(), rank, self.memory, self.timeout_s)
