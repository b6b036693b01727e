"""Times drawing tokens from random logits, in PyTorch and in C++, and checks that both draw the same, logprobs included.

python bench/sampling.py --rows 32 --vocab 103424

Greedy has two meanings here. Beside given logits it is the search for the largest one. In a step of decode it is the head's
product, which keeps the best token of every row and writes no logits; every other draw needs the product with its logits, and
then the draw. With one thread the thread's own processor time is measured, which other programs disturb least; with more, time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from workers.model.native.build import build, default_cache_folder
from workers.model.native.draw import NativeRowKernel
from workers.model.native.library import Dimensions, Library, WeightPart
from workers.request import SamplingParams
from workers.runner import SampleSpec
from workers.sampling.edits import EditTracker, changes_logits
from workers.sampling.sampler import sample

_PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
CASES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("greedy", 3.0, {"temperature": 0.0}),
    ("greedy, penalties", 3.0, {"temperature": 0.0, **_PENALTIES}),
    ("greedy, 300 biases", 3.0, {"temperature": 0.0, "logit_bias": tuple((7 * i, 1.0) for i in range(300))}),
    ("greedy, 1000 bad words", 3.0, {"temperature": 0.0, "bad_words": tuple((i, i + 1) for i in range(1000))}),
    ("greedy, logprobs 0", 3.0, {"temperature": 0.0, "logprobs": 0}),
    ("greedy, logprobs 20", 3.0, {"temperature": 0.0, "logprobs": 20}),
    ("temperature 1", 3.0, {}),
    ("temperature 0.7", 3.0, {"temperature": 0.7}),
    ("penalties", 3.0, _PENALTIES),
    ("min_p 0.05", 3.0, {"min_p": 0.05}),
    ("top_k 50", 3.0, {"top_k": 50}),
    ("top_k 50, top_p 0.9", 3.0, {"top_k": 50, "top_p": 0.9}),
    ("top_k 50, top_p 0.9, min_p 0.02, penalties", 3.0, {"top_k": 50, "top_p": 0.9, "min_p": 0.02, **_PENALTIES}),
    ("the same, logprobs 5", 3.0, {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "logprobs": 5, **_PENALTIES}),
    ("top_k 2000", 3.0, {"top_k": 2000}),
    ("top_p 0.9, peaked", 6.0, {"top_p": 0.9}),
    ("top_p 0.95", 3.0, {"top_p": 0.95}),
    ("top_p 0.95, flat", 0.5, {"top_p": 0.95}),
)
"""Name, standard deviation of the logits, parameters."""
_PROMPT_TOKENS, _OUTPUT_TOKENS = 1000, 500
"""Of each row, for the penalties and the bad words."""


def make_specs(num_rows: int, vocab: int, fields: dict[str, Any]) -> list[SampleSpec]:
    """As the scheduler makes them: what changes about the logits is known from the tokens before."""
    specs = []
    generator = torch.Generator().manual_seed(num_rows)
    for row in range(num_rows):
        params = SamplingParams(**{"temperature": 1.0, "seed": row, **fields})
        tokens = torch.randint(vocab, (_PROMPT_TOKENS + _OUTPUT_TOKENS,), generator=generator).tolist()
        prompt, output = tokens[:_PROMPT_TOKENS], tokens[_PROMPT_TOKENS:]
        edits = EditTracker(params, prompt).edits(output) if changes_logits(params) else None
        specs.append(SampleSpec(params, 0, row, prompt, output, edits=edits))
    return specs


class Head:
    """A model of no layers: its head's product alone."""

    def __init__(self, library: Library, vocab: int, hidden: int, threads: int) -> None:
        frequencies, is_mixture = np.zeros(32, dtype=np.float32), np.zeros(1, dtype=np.int64)
        widths = dict.fromkeys(("num_experts", "num_choices", "expert_width", "shared_width", "num_layers"), 0)
        sizes = {"hidden_size": hidden, "num_heads": 1, "num_kv_heads": 1, "head_dim": 64, "dense_width": 64}
        dimensions = Dimensions(
            vocab_size=vocab, num_threads=threads, eps=1e-5, frequencies=frequencies.ctypes.data,
            is_mixture=is_mixture.ctypes.data, **widths, **sizes,
        )  # fmt: skip
        self.library = library
        self.model = library.create(dimensions, is_bf16=True)
        for first in range(0, vocab, 4096):
            rows = torch.randn(min(4096, vocab - first), hidden).bfloat16()
            library.take(self.model, WeightPart.EMBEDDING, 0, 0, first, len(rows), rows.data_ptr())
        ones = torch.ones(hidden, dtype=torch.bfloat16)
        library.take(self.model, WeightPart.NORM, 0, 0, 0, hidden, ones.data_ptr())
        self._hidden = hidden

    def run(self, num_rows: int, logits_RV: torch.Tensor | None) -> None:
        x_RD, best_R = torch.zeros(num_rows, self._hidden, dtype=torch.bfloat16), np.empty(num_rows, dtype=np.int64)
        peaks_R = np.empty(num_rows, dtype=np.float32)
        address = None if logits_RV is None else logits_RV.data_ptr()
        self.library.head(self.model, x_RD.data_ptr(), num_rows, address, best_R.ctypes.data, peaks_R.ctypes.data)


def least_s(calls: list[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """The least time that each took; they take turns."""
    best_s = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            started = clock()
            call()
            best_s[index] = min(best_s[index], clock() - started)
    return best_s


def report(num_rows: int, head: Head, options: argparse.Namespace) -> None:
    """Measures and prints one table."""
    kernel = NativeRowKernel(head.library, head.model)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(num_rows)
    scales = {scale for _, scale, _ in CASES}
    logits = {scale: torch.randn(num_rows, options.vocab, generator=generator) * scale for scale in sorted(scales)}
    written_RV = torch.empty(num_rows, options.vocab)
    cases = [(name, logits[scale], make_specs(num_rows, options.vocab, fields)) for name, scale, fields in CASES]
    plain_s = [float("nan")] * len(cases)
    if not options.no_pytorch:
        for name, logits_RV, specs in cases:
            if sample(logits_RV, specs, kernel) != sample(logits_RV, specs):
                raise SystemExit(f"{name}: the kernels drew other tokens")
        plain_s = least_s([partial(sample, x, specs) for _, x, specs in cases], max(1, options.rounds // 3), clock)
    calls: list[Callable[[], object]] = [
        partial(logits[3.0].argmax, -1),
        partial(head.run, num_rows, None),
        partial(head.run, num_rows, written_RV),
        *(partial(sample, x, specs, kernel) for _, x, specs in cases),
    ]
    argmax_s, greedy_step_s, product_s, *quick_s = least_s(calls, options.rounds, clock)
    print(
        f"\n{num_rows} rows, us a row: torch.argmax {argmax_s / num_rows * 1e6:.0f}, the head's product with its best "
        f"tokens {greedy_step_s / num_rows * 1e6:.0f}, with logits {product_s / num_rows * 1e6:.0f}\n\n"
        "| parameters | PyTorch, us/row | C++, us/row | x greedy | x torch.argmax | with the head, x greedy |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    for (name, _, _), slow_s, own_s in zip(cases, plain_s, quick_s, strict=True):
        ratios = (own_s / quick_s[0], own_s / argmax_s, (product_s + own_s) / greedy_step_s)
        marks = " | ".join(f"{ratio:.2f}{'' if ratio <= 2 else ' (above 2)'}" for ratio in ratios)
        slow = "" if options.no_pytorch else f"{slow_s / num_rows * 1e6:.0f}"
        print(f"| {name} | {slow} | {own_s / num_rows * 1e6:.0f} | {marks} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--vocab", type=int, default=103_424, help="that of ERNIE 4.5")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the head's product; that of ERNIE 4.5 0.3B")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--no-pytorch", action="store_true", help="leave out PyTorch's time, and the comparison with it"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = Library(build(default_cache_folder()))
    head = Head(library, options.vocab, options.hidden, options.threads)
    print(f"{library.instruction_set}, {options.threads} threads, vocabulary of {options.vocab}")
    for num_rows in options.rows:
        report(num_rows, head, options)
    library.destroy(head.model)


if __name__ == "__main__":
    main()
