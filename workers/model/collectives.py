"""The group operations of one epoch of a group of ranks, each of which another thread can abort; knows no model and no leader.

An epoch is one life of the process groups: when a rank is lost the epoch is aborted, and the ranks meet again in the
next one under another prefix of the store. Weights and KV are not touched. Gloo serves CPU tensors, NCCL CUDA tensors.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from workers.errors import RankLost

_POLL_S = 0.1
"""How often a waiting thread looks whether the epoch was aborted; a finished operation wakes it at once."""
_OPERATION_TIMEOUT = timedelta(seconds=300)
"""After this the library itself gives an operation up; lost ranks are found long before, by their silence."""

T = TypeVar("T")


class Pending:
    """A group operation under way."""

    def __init__(self, work: Any, aborted: threading.Event, *keep: Tensor) -> None:
        self._work, self._aborted = work, aborted
        self._keep = keep  # the operation reads and writes them until it ends

    def wait(self) -> None:
        """Raises RankLost when a peer is gone or the epoch was aborted."""
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
        self._group, self._aborted = group, aborted
        self.num_sent_bytes = 0
        """Bytes that this rank sent to others in all_to_all and all_gather."""
        self.num_operations = 0

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> tuple[Tensor, Pending]:
        """Sends `send[r]` of the rows to each rank r, in order of rank; returns where `receive[r]` rows of each will be."""
        arriving = rows.new_empty((sum(receive), *rows.shape[1:]))
        rows = rows.contiguous()
        self._count((len(rows) - send[self.rank]) * _row_bytes(rows))
        work = self._start(
            lambda: self._group.alltoall_base(arriving, rows, list(receive), list(send), c10d.AllToAllOptions())
        )
        return arriving, Pending(work, self._aborted, arriving, rows)

    def all_gather(self, part: Tensor) -> tuple[Tensor, Pending]:
        """Every rank's `part`, of equal shapes, [size, ...]."""
        part = part.contiguous()
        gathered = part.new_empty((self.size, *part.shape))
        self._count((self.size - 1) * part.numel() * part.element_size())
        work = self._start(lambda: self._group.allgather([list(gathered.unbind(0))], [part]))
        return gathered, Pending(work, self._aborted, gathered, part)

    def _start(self, operation: Any) -> Any:
        if self._aborted.is_set():
            raise RankLost("the epoch was aborted")
        try:
            return operation()
        except RuntimeError as error:
            raise RankLost(f"a group operation could not start: {error}") from error

    def _count(self, num_bytes: int) -> None:
        self.num_sent_bytes += num_bytes
        self.num_operations += 1


class WorldEpoch:
    """One epoch's process groups: all ranks, and the `tensor` ranks that share this one's sequences."""

    def __init__(self, epoch: int, world: Communicator, tensor: Communicator, aborted: threading.Event) -> None:
        self.epoch = epoch
        self.world, self.tensor = world, tensor
        self._aborted = aborted

    @staticmethod
    def join(
        epoch: int,
        store_address: tuple[str, int],
        *,
        rank: int,
        size: int,
        tensor: int,
        host: str,
        timeout_s: float,
        aborted: threading.Event,
        device: str = "cpu",
    ) -> WorldEpoch:
        """Meets the other ranks in the store at `store_address`. `aborted` ends this and every later wait.

        `host` is this rank's own address, which Gloo listens at. Raises RankLost when they do not all come in time.
        """
        found: list[WorldEpoch | BaseException] = []

        def meet() -> None:
            try:
                host_name, port = store_address
                store = c10d.TCPStore(host_name, port, None, False, timeout=timedelta(seconds=timeout_s))
                named = c10d.PrefixStore(f"epoch-{epoch}", store)
                world = _process_group(c10d.PrefixStore("world", named), rank, size, device, host)
                part = rank // tensor
                inner = (
                    _process_group(c10d.PrefixStore(f"tensor-{part}", named), rank % tensor, tensor, device, host)
                    if 1 < tensor < size
                    else world
                )
                found.append(
                    WorldEpoch(
                        epoch,
                        Communicator(world, rank, size, aborted),
                        Communicator(inner, rank % tensor, tensor, aborted),
                        aborted,
                    )
                )
            except BaseException as error:
                found.append(error)

        # a constructor that waits for a rank that will not come cannot be interrupted: it is left behind
        thread = threading.Thread(target=meet, name=f"join-{epoch}", daemon=True)
        thread.start()
        while thread.is_alive() and not aborted.is_set():
            thread.join(_POLL_S)
        if not found:
            raise RankLost(f"epoch {epoch} was aborted while its ranks met")
        if isinstance(found[0], BaseException):
            raise RankLost(f"the ranks of epoch {epoch} did not meet: {found[0]}") from found[0]
        return found[0]

    def abort(self) -> None:
        """Makes every waiting and every later operation of this epoch raise RankLost, in all threads of this process."""
        self._aborted.set()
        for communicator in {id(c._group): c for c in (self.world, self.tensor)}.values():
            group = communicator._group
            if hasattr(group, "abort"):
                with contextlib.suppress(RuntimeError):
                    group.abort()
            _bury(group)


class Links:
    """The process groups that a model computes over: those of the epoch it is in."""

    def __init__(self) -> None:
        self._epoch: WorldEpoch | None = None

    def use(self, epoch: WorldEpoch | None) -> None:
        self._epoch = epoch

    @property
    def world(self) -> Communicator:
        """Raises RankLost between epochs."""
        return self._current.world

    @property
    def tensor(self) -> Communicator:
        return self._current.tensor

    @property
    def _current(self) -> WorldEpoch:
        if self._epoch is None:
            raise RankLost("the group is between two epochs")
        return self._epoch


def start_store(host: str) -> c10d.TCPStore:
    """The store where the ranks of a group meet, kept by its leader on a free port."""
    return c10d.TCPStore(host, 0, None, True, wait_for_workers=False, timeout=timedelta(seconds=30))


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


def _process_group(store: Any, rank: int, size: int, device: str, host: str) -> Any:
    """A group of its own beside torch's global one. Not tried here on CUDA: there was no machine with two GPUs."""
    if device.startswith("cuda"):
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = _OPERATION_TIMEOUT
        return c10d.ProcessGroupNCCL(store, rank, size, options)
    gloo = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = _OPERATION_TIMEOUT
    return c10d.ProcessGroupGloo(store, rank, size, gloo)


def _bury(group: Any) -> None:
    """Lets go of a group on a thread of its own: its end waits for operations that wait for a hung rank."""
    threading.Thread(target=lambda held: held.clear(), args=([group],), name="bury", daemon=True).start()
