"""Measures what this machine reaches: read bandwidth and bf16 matrix products. Driven by bench/engine.py.

`python machine_worker.py NUM_THREADS` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
GEMM_ROWS, GEMM_INNER, GEMM_COLUMNS = 1024, 4096, 4096
REPEATS = 5


def best_s(run: Callable[[], object]) -> float:
    """Shortest of a few runs: a limit is what was reached once."""
    run()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def read_bytes_per_s(num_threads: int) -> float:
    """The faster of a sum and a maximum over 1 GiB of fp32."""
    torch.set_num_threads(num_threads)
    values = torch.ones(READ_BYTES // 4)
    return READ_BYTES / min(best_s(values.sum), best_s(values.max))


def flops_per_s(num_threads: int) -> float:
    """bf16 product with weights packed by oneDNN, and without."""
    torch.set_num_threads(num_threads)
    x = torch.randn(GEMM_ROWS, GEMM_INNER).bfloat16()
    weight = torch.randn(GEMM_COLUMNS, GEMM_INNER).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, GEMM_ROWS)
    with torch.inference_mode():
        plain_s = best_s(lambda: torch.nn.functional.linear(x, weight))
        packed_s = best_s(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return 2 * GEMM_ROWS * GEMM_INNER * GEMM_COLUMNS / min(plain_s, packed_s)


if __name__ == "__main__":
    threads = int(sys.argv[1])
    print(json.dumps({"read_bytes_per_s": read_bytes_per_s(threads), "flops_per_s": flops_per_s(threads)}))
