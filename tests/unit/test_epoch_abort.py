"""The process groups of an epoch end together: one's abort may need the other's."""

from __future__ import annotations

import threading

from workers.model.parallel.collectives import Communicator, WorldEpoch

BOUND_S = 60.0


class Entangled:
    """A process group of a GPU whose abort ends only once the other one's has begun."""

    def __init__(self, both: threading.Barrier) -> None:
        self._both = both
        self.is_over = threading.Event()

    def abort(self) -> None:
        self._both.wait(BOUND_S)
        self.is_over.set()


def test_an_abort_of_one_group_does_not_wait_for_that_of_another() -> None:
    for is_from_another_thread in (False, True):
        both, aborted = threading.Barrier(2), threading.Event()
        groups = [Entangled(both), Entangled(both)]
        world, tensor = (Communicator(group, 0, 2, aborted) for group in groups)
        epoch = WorldEpoch(1, world, tensor, aborted, "cuda:0")
        if is_from_another_thread:
            epoch.interrupt()
        else:
            epoch.abort()
        assert aborted.is_set() and all(group.is_over.wait(BOUND_S) for group in groups)
