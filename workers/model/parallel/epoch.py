"""One life of the process groups of a group of ranks; knows no model and no leader.

When a rank is lost the epoch is aborted, and the ranks meet again in the next one under another prefix of the store. Weights and KV
are not touched.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C import _distributed_c10d as c10d

from workers.errors import RankLost
from workers.model.parallel.collectives import Communicator
from workers.model.parallel.process_groups import beside, bury, make_group

_POLL_S = 0.1
"""How often a thread that waits for the others looks whether the epoch was aborted."""
_ABORT_S = 5.0
"""Whoever leaves an epoch waits this long for its groups' aborts; they go on by themselves."""


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
        thread = beside(meet, name=f"join-{epoch}")
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
        groups = {id(c.group): c.group for c in (self.world, self.tensor)}
        return [group for group in groups.values() if group is not None]

    def _start_aborts(self) -> list[threading.Thread]:
        """All groups at the same time: one communicator's abort may wait for the device, and so for the kernel of another."""
        return [beside(_abort, group, name="abort") for group in self._groups if hasattr(group, "abort")]


def _abort(group: Any) -> None:
    with contextlib.suppress(RuntimeError):
        group.abort()


def start_store(host: str) -> c10d.TCPStore:
    """The store where the ranks of a group meet, kept by its leader on a free port."""
    return c10d.TCPStore(host, 0, None, True, wait_for_workers=False, timeout=timedelta(seconds=30))
