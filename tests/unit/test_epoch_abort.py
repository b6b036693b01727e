"""The process groups of an epoch end together: one's abort may need the other's."""

from __future__ import annotations

import threading

from workers.model.parallel.collectives import Communicator
from workers.model.parallel.epoch import WorldEpoch

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


class Mourned:
    """A process group whose end waits, as Gloo's does for operations that wait for a hung rank."""

    def __init__(self, ended: list[str], is_over: threading.Event) -> None:
        self._ended, self._is_over = ended, is_over

    def abort(self) -> None:
        pass

    def __del__(self) -> None:
        self._ended.append(threading.current_thread().name)
        self._is_over.set()


def test_the_thread_that_leaves_an_epoch_does_not_wait_for_the_end_of_its_groups() -> None:
    ended: list[str] = []
    is_over, aborted = threading.Event(), threading.Event()
    communicator = Communicator(Mourned(ended, is_over), 0, 2, aborted)
    epoch = WorldEpoch(1, communicator, communicator, aborted)
    del communicator
    epoch.abort()
    epoch.abort()  # once more changes nothing
    del epoch
    assert is_over.wait(BOUND_S) and ended == ["bury"]
