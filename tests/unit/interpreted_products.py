"""Makes Triton's interpreter multiply row by row, so that a row's bits do not depend on its place in a tile; knows no kernel.

The interpreter computes the product of two tiles with numpy. The BLAS in numpy may add up a row's products in another order
for another place in the tile: on AVX2 OpenBLAS does so for every row, on AVX-512 for the last ones. A GPU's matrix units do
not, and the exactness of the CUDA path rests on that. Each rank process imports this module too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_multiply_tiles = InterpreterBuilder.create_dot


def _multiply_rows(builder: Any, a: Any, b: Any, total: Any, precision: Any, max_num_imprecise: Any) -> Any:
    """total + a b, [.., M, O], of tiles [.., M, I] and [.., I, O]."""
    if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):  # fp8 is widened first; no kernel here has it
        return _multiply_tiles(builder, a, b, total, precision, max_num_imprecise)
    product = np.matmul(a.data[..., None, :], b.data[..., None, :, :], dtype=total.data.dtype)[..., 0, :]
    return TensorHandle(product + total.data, total.dtype.scalar)


InterpreterBuilder.create_dot = _multiply_rows
