"""Two ranks of torch.distributed, off WORLD, that move pieces from rank 0 to rank 1; blocking, for helper threads. Knows no frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from workers.errors import TransferFailed
from workers.transports.contract import View

SENDER, RECEIVER = 0, 1
_dist: Any = torch.distributed
"""Its stubs leave out most of what point-to-point needs."""


class PairGroup(Protocol):
    """Both ends call with as many views of the same sizes. A method raises TransferFailed when the pair is broken."""

    def send(self, views: Sequence[View]) -> None:
        """Returns when the views are not read any more."""
        ...

    def receive(self, homes: Sequence[View]) -> Iterator[View]:
        """Asks for all of them at once; yields each home, in order, as soon as it is filled. To be read to its end."""
        ...

    def abort(self) -> None:
        """Ends this pair and no other; from any thread."""
        ...


class GlooPair:
    """Tensors that are views of the two pools, so nothing is copied on the way. Making it waits for the other rank.

    Gloo cannot interrupt a wait: a peer that hangs in the middle of a piece is noticed after `timeout_s`, one that dies at once.
    """

    def __init__(self, store: Any, prefix: str, rank: int, listen_host: str, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._peer = 1 - rank
        try:
            options = _dist.ProcessGroupGloo._Options()
            options._devices = [_dist.ProcessGroupGloo.create_device(hostname=listen_host)]
            options._timeout = self._timeout
            self._group = _dist.ProcessGroupGloo(_dist.PrefixStore(prefix, store), rank, 2, options)
        except RuntimeError as error:
            raise TransferFailed(f"the pair cannot be made: {error}") from error

    def send(self, views: Sequence[View]) -> None:
        try:
            for work in [self._group.send([torch.from_numpy(v)], self._peer, tag) for tag, v in enumerate(views)]:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise TransferFailed(f"the pair broke: {error}") from error

    def receive(self, homes: Sequence[View]) -> Iterator[View]:
        try:
            works = [self._group.recv([torch.from_numpy(v)], self._peer, tag) for tag, v in enumerate(homes)]
            for work, home in zip(works, homes, strict=True):
                work.wait(self._timeout)
                yield home
        except RuntimeError as error:
            raise TransferFailed(f"the pair broke: {error}") from error

    def abort(self) -> None:
        """Its sockets close when the last user drops it."""


def host_store(listen_host: str, timeout_s: float) -> Any:
    """The store that pairs of this sender meet in; `.port` says where. Raises TransferFailed."""
    try:
        return _dist.TCPStore(listen_host, 0, None, True, timedelta(seconds=timeout_s), False)
    except RuntimeError as error:
        raise TransferFailed(f"no store for pairs: {error}") from error


def reach_store(host: str, port: int, timeout_s: float) -> Any:
    """The sender's store, as seen by its receiver. Raises TransferFailed."""
    try:
        return _dist.TCPStore(host, port, None, False, timedelta(seconds=timeout_s), False)
    except RuntimeError as error:
        raise TransferFailed(f"the sender's store cannot be reached: {error}") from error
