"""The group operations of one epoch of a group of ranks, each of which another thread can abort; knows no model and no leader.

An epoch is one life of the process groups: when a rank is lost the epoch is aborted, and the ranks meet again in the
next one under another prefix of the store. Weights and KV are not touched. Gloo serves CPU tensors, NCCL CUDA tensors.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from workers.errors import RankLost

_OPERATION_TIMEOUT = timedelta(seconds=300)
"""After this the library itself gives an operation up; lost ranks are found long before, by their silence."""
_NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
}
"""torch's own watch over NCCL ends the process of a rank whose peer is lost, weights and all, and makes waits hold the
thread. Here the leader watches, and an epoch's abort is what ends operations. Groups read these when they are made."""


def make_group(store: Any, rank: int, size: int, device: str, host: str) -> Any:
    """A group of `size` ranks that meet in `store`; `host` is where Gloo listens. Returns when all of them have come;
    NCCL connects them in their first operations (workers.model.parallel.collectives.Communicator.connect)."""
    if device.startswith("cuda"):
        return _nccl(store, rank, size, torch.device(device))
    options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = _OPERATION_TIMEOUT
    return c10d.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, device: torch.device) -> Any:
    """Not run yet: there was no machine with two GPUs."""
    os.environ.update(_NCCL_SETTINGS)
    torch.cuda.set_device(device)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = _OPERATION_TIMEOUT
    group = c10d.ProcessGroupNCCL(store, rank, size, options)
    # makes the communicator now: otherwise the first operation would, and wait for a rank that does not come
    group.eager_connect_single_device(device)
    return group


def bury(groups: list[Any]) -> None:
    """Lets go of groups that nothing else holds, on a thread of its own: their end waits for operations that wait for a hung rank."""
    _beside(groups.clear, name="bury")


_EXIT_S = 2.0
"""How long a process that ends waits for threads inside torch: Python unwinds one that comes back later through C++ that may not throw, which aborts the process."""
_inside_torch: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _beside(target: Callable[..., object], *args: object, name: str) -> threading.Thread:
    """Starts a call into torch that may never return, on a thread that the end of the process waits for up to _EXIT_S."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    _inside_torch.add(thread)
    thread.start()
    return thread


@atexit.register
def _wait_at_exit() -> None:
    deadline_s = time.monotonic() + _EXIT_S
    for thread in list(_inside_torch):
        thread.join(max(0.0, deadline_s - time.monotonic()))


_POLL_S = 0.1
"""How often a waiting thread looks whether the epoch was aborted; a finished operation wakes it at once."""
_ABORT_S = 5.0
"""Whoever leaves an epoch waits this long for its groups' aborts; they go on by themselves."""
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
        self._group, self._aborted = group, aborted
        self.num_sent_bytes = 0
        """Bytes that this rank sent to others in all_to_all and all_gather."""

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> tuple[Tensor, Pending]:
        """Sends `send[r]` of the rows to each rank r, in order of rank; returns where `receive[r]` rows of each will be."""
        arriving = rows.new_empty((sum(receive), *rows.shape[1:]))
        rows = rows.contiguous()
        self.num_sent_bytes += (len(rows) - send[self.rank]) * _row_bytes(rows)
        work = self._start(
            lambda: self._group.alltoall_base(arriving, rows, list(receive), list(send), c10d.AllToAllOptions())
        )
        return arriving, Pending(work, self._aborted, arriving, rows)

    def all_gather(self, part: Tensor) -> tuple[Tensor, Pending]:
        """Every rank's `part`, of equal shapes, [size, ...]."""
        part = part.contiguous()
        gathered = part.new_empty((self.size, *part.shape))
        self.num_sent_bytes += (self.size - 1) * part.numel() * part.element_size()
        if part.is_cuda:
            work = self._start(lambda: self._group._allgather_base(gathered, part))
        else:
            work = self._start(lambda: self._group.allgather([list(gathered.unbind(0))], [part]))
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
        self._group = None

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


class WorldEpoch:
    """One epoch's process groups: all ranks, and the `tensor` ranks that share this one's sequences."""

    def __init__(
        self, epoch: int, world: Communicator, tensor: Communicator, aborted: threading.Event, device: str = "cpu"
    ) -> None:
        self.epoch = epoch
        self.world, self.tensor = world, tensor
        self._aborted = aborted
        self._on_device = device.startswith("cuda")

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
        prepare: Callable[[Any], None] = lambda store: None,
    ) -> WorldEpoch:
        """Meets the other ranks in the store at `store_address`. `aborted` ends this and every later wait.

        `host` is this rank's own address, which Gloo listens at. `prepare(store)` is what else all ranks do together,
        on the thread that meets them, which an abort leaves behind: it may only make what the caller puts to use.
        Raises RankLost when they do not all come in time.
        """
        met: list[WorldEpoch] = []
        found: list[WorldEpoch | BaseException] = []

        def meet() -> None:
            try:
                host_name, port = store_address
                store = c10d.TCPStore(host_name, port, None, False, timeout=timedelta(seconds=timeout_s))
                named = c10d.PrefixStore(f"epoch-{epoch}", store)
                world = make_group(c10d.PrefixStore("world", named), rank, size, device, host)
                part = rank // tensor
                inner = (
                    make_group(c10d.PrefixStore(f"tensor-{part}", named), rank % tensor, tensor, device, host)
                    if 1 < tensor < size
                    else world
                )
                both = Communicator(world, rank, size, aborted), Communicator(inner, rank % tensor, tensor, aborted)
                met.append(WorldEpoch(epoch, *both, aborted, device))
                Communicator(world, rank, size, aborted).connect(device)  # others than those that count
                if inner is not world:
                    Communicator(inner, rank % tensor, tensor, aborted).connect(device)
                both[0].require_alive()
                prepare(named)
                found.append(met[0])
            except BaseException as error:
                found.append(error)

        # a constructor that waits for a rank that will not come cannot be interrupted: it is left behind
        thread = _beside(meet, name=f"join-{epoch}")
        while thread.is_alive() and not aborted.is_set():
            thread.join(_POLL_S)
        outcome = found[0] if found else None
        if isinstance(outcome, WorldEpoch):
            return outcome
        for unfinished in met:
            unfinished.abort()  # its first operations may hold the device
        if outcome is None:
            raise RankLost(f"epoch {epoch} was aborted while its ranks met")
        raise RankLost(f"the ranks of epoch {epoch} did not meet: {outcome}") from outcome

    def abort(self) -> None:
        """Makes every waiting and every later operation of this epoch raise RankLost, in all threads of this process."""
        self._aborted.set()
        deadline_s = time.monotonic() + _ABORT_S
        for thread in self._start_aborts():
            thread.join(max(0.0, deadline_s - time.monotonic()))
        groups = self._groups
        self.world.let_go()
        self.tensor.let_go()
        bury(groups)

    def interrupt(self) -> None:
        """As `abort`, at once and for another thread than the one that computes, which may be waiting for the device."""
        self._aborted.set()
        if self._on_device:
            self._start_aborts()

    @property
    def _groups(self) -> list[Any]:
        groups = {id(c._group): c._group for c in (self.world, self.tensor)}
        return [group for group in groups.values() if group is not None]

    def _start_aborts(self) -> list[threading.Thread]:
        """All groups at the same time: one communicator's abort may wait for the device, and so for the kernel of another."""
        return [_beside(_abort, group, name="abort") for group in self._groups if hasattr(group, "abort")]


def _abort(group: Any) -> None:
    with contextlib.suppress(RuntimeError):
        group.abort()


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
