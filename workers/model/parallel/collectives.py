"""The group operations of one epoch of a group of ranks, each of which another thread can abort; knows no model and no leader."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from workers.errors import RankLost

_POLL_S = 0.1
"""How often a waiting thread looks whether the epoch was aborted; a finished operation wakes it at once."""
_DEVICE_POLL_S = 50e-6
"""How often a thread that waits for the device looks whether it is done, and whether the epoch was aborted."""

T = TypeVar("T")


class Pending:
    """A group operation under way."""

    def __init__(self, work: Any, aborted: threading.Event, *keep: Tensor) -> None:
        self._work, self._aborted = work, aborted
        self._keep = keep  # the operation reads and writes them until it ends
        self._on_device = keep[0].is_cuda

    def wait(self) -> None:
        """Until its result can be computed with. Raises RankLost when a peer is gone or the epoch was aborted.

        On a GPU this thread goes on: what it gives the device from now on runs behind the operation. After an abort that
        may be anything, so nobody looks at numbers without `Communicator.read`, and indices are bounded before their use.
        """
        if self._on_device:
            self._queue_behind()
            return
        while True:
            if self._aborted.is_set():
                raise RankLost("the epoch was aborted")
            try:
                self._work.wait(timedelta(seconds=_POLL_S))
                return
            except RuntimeError:
                if self._work.is_completed():
                    break
        try:
            self._work.wait()  # it may have ended well just after the wait timed out
        except RuntimeError as error:
            raise RankLost(f"a group operation failed: {error}") from error

    def settle(self) -> None:
        """As `wait`, and on a GPU too until the operation has ended well: for what must not be taken from a broken epoch."""
        self.wait()
        if self._on_device:
            _await_device(self._keep[0].device, self._aborted)

    def _queue_behind(self) -> None:
        if self._aborted.is_set():
            raise RankLost("the epoch was aborted")
        try:
            self._work.wait()  # with a timeout NCCL's would hold this thread, and end the communicator when that is over
        except RuntimeError as error:
            raise RankLost(f"a group operation failed: {error}") from error


def _await_device(device: torch.device, aborted: threading.Event) -> None:
    """Until the device's current stream is done. Raises RankLost when the epoch was aborted, which is said before it is done."""
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        if aborted.is_set():
            raise RankLost("the epoch was aborted")
        time.sleep(_DEVICE_POLL_S)
    if aborted.is_set():
        raise RankLost("the epoch was aborted")


Stages = Generator[Pending, None, T]
"""A computation that pauses where it waits for other ranks, so that another one can run meanwhile."""


def finish(stages: Stages[T]) -> T:
    """Runs a computation to its end, waiting where it must."""
    try:
        while True:
            next(stages).wait()
    except StopIteration as done:
        value: T = done.value
        return value


def finish_both(first: Stages[T], second: Stages[T]) -> tuple[T, T]:
    """Runs two computations with equally many stages: one computes while the other's rows travel.

    They take turns in a fixed order, so every rank starts its group operations in the same order.
    """
    results: list[T] = []
    pending = [next(first), next(second)]
    turns = (first, second)
    while len(results) < 2:
        for at, stages in enumerate(turns):
            pending[at].wait()
            try:
                pending[at] = next(stages)
            except StopIteration as done:
                results.append(done.value)
    return results[0], results[1]


class Communicator:
    """Group operations among `size` ranks. Every rank must start the same ones in the same order."""

    def __init__(self, group: Any, rank: int, size: int, aborted: threading.Event) -> None:
        self.rank, self.size = rank, size
        self.group: Any = group
        """None once it was let go."""
        self._aborted = aborted
        self.num_sent_bytes = 0
        """Bytes that this rank sent to others in all_to_all and all_gather."""

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> tuple[Tensor, Pending]:
        """Sends `send[r]` of the rows to each rank r, in order of rank; returns where `receive[r]` rows of each will be."""
        arriving = rows.new_empty((sum(receive), *rows.shape[1:]))
        rows = rows.contiguous()
        self.num_sent_bytes += (len(rows) - send[self.rank]) * _row_bytes(rows)
        work = self._start(
            lambda: self.group.alltoall_base(arriving, rows, list(receive), list(send), c10d.AllToAllOptions())
        )
        return arriving, Pending(work, self._aborted, arriving, rows)

    def all_gather(self, part: Tensor) -> tuple[Tensor, Pending]:
        """Every rank's `part`, of equal shapes, [size, ...]."""
        part = part.contiguous()
        gathered = part.new_empty((self.size, *part.shape))
        self.num_sent_bytes += (self.size - 1) * part.numel() * part.element_size()
        if part.is_cuda:
            work = self._start(lambda: self.group._allgather_base(gathered, part))
        else:
            work = self._start(lambda: self.group.allgather([list(gathered.unbind(0))], [part]))
        return gathered, Pending(work, self._aborted, gathered, part)

    def read(self, values: Tensor) -> Any:
        """`values` as numbers of the host. Raises RankLost when the epoch is over, whose last results mean nothing."""
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            _await_device(values.device, self._aborted)
            values = host
        return values.tolist()

    def settle(self, device: torch.device) -> None:
        """Until the device has done all it was given, in an epoch that goes on. Raises RankLost when that was aborted."""
        if device.type == "cuda":
            _await_device(device, self._aborted)
        self.require_alive()

    def connect(self, device: str) -> None:
        """One small operation of either kind, to its end: NCCL connects two ranks only when they first have to do with each
        other, and every rank would wait for a lost one in mid-step."""
        ones_G1 = torch.ones(self.size, 1, dtype=torch.uint8, device=device)
        each = [1] * self.size
        for _, pending in (self.all_to_all(ones_G1, each, each), self.all_gather(ones_G1[:1])):
            pending.settle()

    def let_go(self) -> None:
        """Of the group, once its epoch is over and nothing is started any more: whoever holds it last waits for its end."""
        self.group = None

    def require_alive(self) -> None:
        """Raises RankLost when the epoch was aborted."""
        if self._aborted.is_set():
            raise RankLost("the epoch was aborted")

    def _start(self, operation: Any) -> Any:
        if self._aborted.is_set():
            raise RankLost("the epoch was aborted")
        try:
            return operation()
        except RuntimeError as error:
            raise RankLost(f"a group operation could not start: {error}") from error


class Links:
    """What a model computes over: the communicators of the epoch it is in."""

    def __init__(self) -> None:
        self._joined: tuple[Communicator, Communicator] | None = None

    def use(self, world: Communicator, tensor: Communicator) -> None:
        """Those of all ranks, and of the ranks that share this one's sequences."""
        self._joined = world, tensor

    def leave(self) -> None:
        self._joined = None

    @property
    def world(self) -> Communicator:
        """Raises RankLost between epochs."""
        return self._current[0]

    @property
    def tensor(self) -> Communicator:
        return self._current[1]

    @property
    def _current(self) -> tuple[Communicator, Communicator]:
        if self._joined is None:
            raise RankLost("the group is between two epochs")
        return self._joined


def gather(links: Links, part: Tensor) -> Stages[Tensor]:
    """Parts of all ranks that share the sequences, [tensor, ...]."""
    gathered, pending = links.tensor.all_gather(part)
    yield pending
    return gathered


_ONE_STEP_BYTES = 256 << 10
"""Sums of less than this are gathered whole: one exchange instead of two, at more bytes."""


def add_up(links: Links, part_TD: Tensor) -> Stages[Tensor]:
    """Sum of the parts that the ranks of a pool hold of each row, added in fp32 in order of rank, whatever the batch."""
    tensor = links.tensor
    num_rows = part_TD.shape[0]
    if num_rows * _row_bytes(part_TD) <= _ONE_STEP_BYTES:
        parts_GTD = yield from gather(links, part_TD)
        return _in_order(parts_GTD).to(part_TD.dtype)
    step = -(-num_rows // tensor.size)
    padded = torch.nn.functional.pad(part_TD, (0, 0, 0, step * tensor.size - num_rows))
    arriving, pending = tensor.all_to_all(padded, [step] * tensor.size, [step] * tensor.size)
    yield pending
    mine = _in_order(arriving.view(tensor.size, step, -1)).to(part_TD.dtype)
    gathered = yield from gather(links, mine)
    return gathered.flatten(0, 1)[:num_rows]


def _in_order(parts_GTD: Tensor) -> Tensor:
    total = parts_GTD[0].float()
    for part in parts_GTD[1:]:
        total = total + part.float()
    return total


def _row_bytes(rows: Tensor) -> int:
    return rows[0:1].numel() * rows.element_size() if len(rows) else 0
