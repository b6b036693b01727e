"""Brings small lists of numbers to the device that holds the logits, without making the host wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Values = Sequence[object] | npt.NDArray[np.number]


def on_device(values: Values, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a tensor, copied from pinned memory when `device` is CUDA: a copy from other memory waits."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
