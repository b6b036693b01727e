"""Measures what this machine reaches: read bandwidth and matrix products in bf16 or fp32. Driven by bench/engine.py.

`python machine_worker.py NUM_THREADS` prints one JSON object. A host without AVX-512 multiplies bf16 more slowly than fp32,
and an engine there may compute bf16 weights in fp32: the limit is the fastest product, whatever its type.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's dot product; the threads here are this program's own, or torch's

import numpy as np
import torch
from torch import Tensor

READ_BYTES = 1 << 30
GEMM_SHAPES = ((1024, 1024, 4096), (1024, 4096, 4096))
"""Rows, inner size, columns: what fits in the cache, and what does not."""
REPEATS = 5
TOO_SLOW_S = 0.5
"""What takes this long at first is not run again: something else is the limit."""


def best_s(run: Callable[[], object]) -> float:
    """Shortest of a few runs: a limit is what was reached once."""
    times: list[float] = []
    while len(times) <= REPEATS and not (times and times[0] > TOO_SLOW_S):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def read_bytes_per_s(num_threads: int) -> float:
    """The fastest of three reductions over 1 GiB, each thread reading a part of its own at the same time.

    On huge pages where the kernel grants them: with small ones a miss in the page table is what is measured.
    """
    buffer = mmap.mmap(-1, READ_BYTES)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    values = np.frombuffer(buffer, dtype=np.float32)
    values.fill(1.0)
    parts = np.split(values, [len(values) * i // num_threads for i in range(1, num_threads)])

    def dot(part: np.ndarray) -> object:
        half = len(part) // 2
        return np.dot(part[:half], part[half : 2 * half])

    readers: tuple[Callable[[np.ndarray], object], ...] = (dot, np.max, lambda part: np.max(part.view(np.int8)))
    with ThreadPoolExecutor(num_threads) as threads:  # numpy computes without the interpreter's lock
        fastest_s = min(best_s(lambda read=read: list(threads.map(read, parts))) for read in readers)
    return READ_BYTES / fastest_s


def products(x: Tensor, weight: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """The ways in which torch multiplies: as it is, and with weights packed by oneDNN where that has this type."""
    name = "bf16" if x.dtype is torch.bfloat16 else "fp32"
    yield f"{name} F.linear", lambda: torch.nn.functional.linear(x, weight)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    except RuntimeError:  # bf16 without AVX-512
        return
    yield f"{name} packed by oneDNN", lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def fastest_product(num_threads: int) -> tuple[float, str]:
    """FLOPs per second of the fastest product of bf16 or fp32, and its name."""
    torch.set_num_threads(num_threads)
    found = []
    with torch.inference_mode():
        for num_rows, inner, columns in GEMM_SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(num_rows, inner).to(dtype)
                weight = torch.randn(columns, inner).to(dtype)
                for name, run in products(x, weight):
                    found.append((2 * num_rows * inner * columns / best_s(run), name))
    return max(found)


if __name__ == "__main__":
    threads = int(sys.argv[1])
    flops_per_s, product = fastest_product(threads)
    print(json.dumps({"read_bytes_per_s": read_bytes_per_s(threads), "flops_per_s": flops_per_s, "product": product}))
