"""Loads the kernels of the best instruction set whose library passes a check at start; knows no model that is served.

Shapes: R rows, V vocabulary, D hidden.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from workers.errors import InvariantViolated
from workers.machine.native_build import AUTO, COMPILERS, BuildFailed, NativeSource, find_library
from workers.model.native.build import KERNELS, choices
from workers.model.native.library import Dimensions, Library, StepArguments, WeightPart

logger = logging.getLogger(__name__)

_ROWS, _VOCAB, _HIDDEN = 3, 70, 96
"""More than one panel of outputs, the last one not full."""


def load(
    folder: Path | None,
    instruction_set: str = AUTO,
    compilers: Sequence[str] = COMPILERS,
    source: NativeSource = KERNELS,
) -> tuple[Library, tuple[str, ...]]:
    """The kernels, and a warning for each better set that was refused. `folder` keeps what must be compiled (None: ~/.cache/baton).

    Raises BuildFailed when no set is left, InvalidConfig when the one asked for is beyond the processor.
    """
    refused: list[str] = []
    for each in choices(instruction_set, source=source):
        try:
            library = Library(find_library(source, each, folder, compilers))
            check(library, each.name)
        except (BuildFailed, InvariantViolated) as error:
            refused.append(f"the kernels for {each.name} are not used: {error}")
        else:
            for warning in refused:
                logger.warning(warning)
            return library, tuple(refused)
    raise BuildFailed("; ".join(dict.fromkeys(refused)))


def check(library: Library, instruction_set: str) -> None:
    """Raises BuildFailed when a library is not the one declared here, or computes a small product wrongly. Takes milliseconds."""
    if library.instruction_set != instruction_set:
        raise BuildFailed(f"the library is one for {library.instruction_set}")
    declared = (ctypes.sizeof(Dimensions), ctypes.sizeof(StepArguments))
    if library.struct_bytes() != declared:
        raise BuildFailed(f"its structs take {library.struct_bytes()} bytes, those declared in Python {declared}")
    for dtype in (torch.float32, torch.bfloat16):
        _check_product(library, dtype)


def _check_product(library: Library, dtype: torch.dtype) -> None:
    """The head of a model without layers, on small integers: all sums are exact in any order."""
    unused = np.zeros(16, dtype=np.float32)
    dimensions = Dimensions(
        vocab_size=_VOCAB, num_tokens=_VOCAB, hidden_size=_HIDDEN, num_heads=1, num_kv_heads=1, head_dim=32, dense_width=32, num_threads=1,
        frequencies=unused.ctypes.data, is_mixture=unused.ctypes.data,
    )  # fmt: skip
    head_VD = (torch.arange(_VOCAB * _HIDDEN).reshape(_VOCAB, _HIDDEN) * 7 % 13 - 6).to(dtype)
    x_RD = (torch.arange(_ROWS * _HIDDEN).reshape(_ROWS, _HIDDEN) * 5 % 3 - 1).sign().add(0.5).sign().to(dtype)
    norm_D = torch.ones(_HIDDEN, dtype=dtype)
    logits_RV, best_R = torch.empty(_ROWS, _VOCAB), np.empty(_ROWS, dtype=np.int64)
    peaks_R = torch.empty(_ROWS)
    model = library.create(dimensions, dtype is torch.bfloat16)
    try:
        library.take(model, WeightPart.NORM, 0, 0, 0, _HIDDEN, norm_D.data_ptr())
        library.take(model, WeightPart.EMBEDDING, 0, 0, 0, _VOCAB, head_VD.data_ptr())
        library.head(model, x_RD.data_ptr(), _ROWS, logits_RV.data_ptr(), best_R.ctypes.data, peaks_R.data_ptr())
    finally:
        library.destroy(model)
    # Every element is 1 or -1, so that the norm before the head changes nothing.
    expected_RV = x_RD.double() @ head_VD.double().T
    if not torch.allclose(logits_RV.double(), expected_RV, rtol=1e-4, atol=1e-3):
        raise BuildFailed(f"a product in {dtype} is wrong by {(logits_RV - expected_RV).abs().max():g}")
    if best_R.tolist() != logits_RV.argmax(-1).tolist():
        raise BuildFailed(f"the most likely tokens in {dtype} are not those of the logits")
