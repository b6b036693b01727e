"""The process groups of torch, and calls into torch that may never return; knows no model and no leader.

Gloo serves CPU tensors, NCCL CUDA tensors.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

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
    beside(groups.clear, name="bury")


_EXIT_S = 2.0
"""How long a process that ends waits for threads inside torch: Python unwinds one that comes back later through C++ that may not throw, which aborts the process."""
_inside_torch: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def beside(target: Callable[..., object], *args: object, name: str) -> threading.Thread:
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
