"""What copying beside the model needs of a device: marks in the order of its work, and copies behind a mark; knows no blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Mark(Protocol):
    """A place in the order of a device's work."""

    def wait(self) -> None:
        """Returns when the device has come here. Raises RuntimeError when what it did before has failed."""


class CopyEngine(Protocol):
    """Copies from a device's memory to the host, beside what the model computes there."""

    def mark(self) -> Mark:
        """Behind everything that the calling thread has launched for the model so far."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Host memory uint8 [num_bytes] that the device writes by itself."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        """Begins to copy each (pinned target, source on the device), uint8 of one size, once the device has come to `after`.

        The mark is where all are done. The sources must not change meanwhile.
        """
        ...


def copy_engine(device: torch.device) -> CopyEngine:
    return CudaCopies(device) if device.type == "cuda" else HostCopies()


class CudaMark:
    """An event. Whoever waits for it sleeps, so that it takes no core from the thread that launches."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaCopies:
    """A stream of its own, so that copies run beside kernels. Not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> CudaMark:
        return CudaMark(torch.cuda.current_stream(self._device))

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Mark) -> CudaMark:
        assert isinstance(after, CudaMark)
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # also makes the device current on this thread
            self._stream.wait_event(after.event)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return CudaMark(self._stream)


class Reached:
    """The mark of work that was done when it was given."""

    def wait(self) -> None:
        """Returns."""


class HostCopies:
    """For a pool in host memory (Triton's interpreter): launched work and copies are done when the call returns."""

    def mark(self) -> Reached:
        return Reached()

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Mark) -> Reached:
        for target, source in pairs:
            np.copyto(target.numpy(), source.numpy())
        return Reached()
