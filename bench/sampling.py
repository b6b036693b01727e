"""Times drawing tokens from random logits, with the C++ shortcuts and without, and checks that both draw the same.

python bench/sampling.py --rows 1 8 32 --vocab 103424
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from workers.model.native.build import build, default_cache_folder
from workers.model.native.draw import NativeShortcuts
from workers.model.native.library import Library
from workers.request import SamplingParams
from workers.runner import SampleSpec
from workers.sampling.sampler import sample
from workers.sampling.shortcuts import Shortcuts

CASES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("greedy", 3.0, {"temperature": 0.0}),
    ("temperature 1", 3.0, {}),
    ("top_p 0.9, peaked", 6.0, {"top_p": 0.9}),
    ("top_p 0.95", 3.0, {"top_p": 0.95}),
    ("top_p 0.95, flat", 0.5, {"top_p": 0.95}),
    ("top_k 50", 3.0, {"top_k": 50}),
    ("top_k 50, top_p 0.9", 3.0, {"top_k": 50, "top_p": 0.9}),
    ("min_p 0.05", 3.0, {"min_p": 0.05}),
)
"""Name, standard deviation of the logits, parameters."""


def measure(logits_RV: torch.Tensor, specs: list[SampleSpec], ways: list[Shortcuts | None], rounds: int) -> list[float]:
    """The least ms a row that each way took; the ways take turns."""
    best_s = [float("inf")] * len(ways)
    for _ in range(rounds):
        for index, way in enumerate(ways):
            started = time.perf_counter()
            sample(logits_RV, specs, way)
            best_s[index] = min(best_s[index], time.perf_counter() - started)
    return [seconds / len(specs) * 1e3 for seconds in best_s]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--vocab", type=int, default=103_424, help="that of ERNIE 4.5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shortcuts = NativeShortcuts(Library(build(default_cache_folder())))
    print("| parameters | rows | PyTorch, ms/row | with C++, ms/row | ratio |\n|---|---:|---:|---:|---:|")
    for name, deviation, fields in CASES:
        for rows in options.rows:
            logits_RV = torch.randn(rows, options.vocab, generator=torch.Generator().manual_seed(rows)) * deviation
            params = [SamplingParams(**{"temperature": 1.0, "seed": row, **fields}) for row in range(rows)]
            specs = [SampleSpec(p, 0, row, (), ()) for row, p in enumerate(params)]
            if sample(logits_RV, specs, shortcuts) != sample(logits_RV, specs):
                raise SystemExit(f"{name}: the shortcuts drew other tokens")
            plain_ms, quick_ms = measure(logits_RV, specs, [None, shortcuts], options.rounds)
            print(f"| {name} | {rows} | {plain_ms:.3f} | {quick_ms:.3f} | {plain_ms / quick_ms:.1f} |")


if __name__ == "__main__":
    main()
