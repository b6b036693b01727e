"""Decode and prefill speed of the CUDA path beside transformers, as shares of what the GPU allows; random weights.

python bench/engine_cuda.py                       ERNIE-4.5-21B-A3B in bf16
python bench/engine_cuda.py --not-deterministic   with kernels that may depend on the batch
python bench/engine_cuda.py --device cpu --tiny   checks this program itself in Triton's interpreter; its figures mean nothing
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from typing import Any

ERNIE_21B = dict(
    vocab_size=103424,
    hidden_size=2560,
    intermediate_size=12288,
    num_layers=28,
    num_heads=20,
    num_kv_heads=4,
    head_dim=128,
)
TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
COLUMNS = ("what", "size", "baton tokens/s", "of limit", "transformers tokens/s", "of limit")


def model_config(tiny: bool, max_len: int) -> Any:
    from workers.model.checkpoint.ernie_config import ErnieConfig, MoeConfig

    num_experts, num_choices, width = (4, 2, 16) if tiny else (64, 6, 1536)
    dimensions = TINY if tiny else ERNIE_21B
    moe = MoeConfig(num_experts, num_choices, 2, width, 1, dimensions["num_layers"] - 1, 1, 1e-12)
    return ErnieConfig(
        **dimensions, max_position_embeddings=max_len, rope_theta=500_000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True, moe=moe, eos_token_ids=(2,),
    )  # fmt: skip


def measure(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each case; None where the device had no memory for it."""
    import torch

    found: dict[str, Any] = {}
    for kind, sizes in (("decode", args.batches), ("prefill", args.prompts)):
        for size in sizes:
            try:
                seconds = engine.decode(size, args.context, args.steps) if kind == "decode" else engine.prefill(size)
                found[f"{kind}/{size}"] = size / seconds
            except torch.OutOfMemoryError:
                found[f"{kind}/{size}"] = None
            gc.collect()
            torch.cuda.empty_cache()
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from cuda_engines import Baton, Transformers, matmul_flops_per_s, memory_bytes_per_s
    from cuda_limits import Limits

    device = torch.device(args.device)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    max_len = max(args.context + args.steps + 64, *args.prompts)
    config = model_config(args.tiny, max_len)
    limits = Limits(
        config,
        dtype.itemsize,
        memory_bytes_per_s(device, 1 << (20 if args.tiny else 31)),
        matmul_flops_per_s(device, dtype, 64 if args.tiny else 8192),
    )
    num_blocks = max(args.batches) * -(-(args.context + args.steps + 3) // 64) + -(-max(args.prompts) // 64)
    baton: Any = Baton(
        config, device, dtype, deterministic=not args.not_deterministic, max_len=max_len,
        max_batch=max(args.batches), num_blocks=num_blocks,
    )  # fmt: skip
    warnings, speeds = baton.warnings, {"baton": measure(baton, args)}
    del baton  # two copies of the weights need not fit
    gc.collect()
    torch.cuda.empty_cache()
    if not args.no_transformers:
        speeds["transformers"] = measure(Transformers(config, device, dtype, max_len), args)
    bounds = {f"decode/{b}": limits.decode_tokens_per_s(b, args.context) for b in args.batches}
    bounds |= {f"prefill/{s}": limits.prefill_tokens_per_s(s) for s in args.prompts}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": "tiny" if args.tiny else "ERNIE-4.5-21B-A3B",
        "dtype": str(dtype).removeprefix("torch."),
        "deterministic": not args.not_deterministic,
        "context": args.context,
        "bytes_per_s": limits.bytes_per_s,
        "flops_per_s": limits.flops_per_s,
        "warnings": list(warnings),
        "limit_tokens_per_s": bounds,
        "tokens_per_s": speeds,
    }


def table(report: dict[str, Any]) -> str:
    """A Markdown table, one line a case."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for case, limit in report["limit_tokens_per_s"].items():
        cells = case.split("/")
        for engine in ("baton", "transformers"):
            speed = report["tokens_per_s"].get(engine, {}).get(case)
            cells += ["-", "-"] if speed is None else [f"{speed:.1f}", f"{speed / limit:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model and sizes that only show that this program works")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences decoded at once (1 8 64 256)")
    parser.add_argument("--prompts", type=int, nargs="+", help="lengths of prompts (2048 8192)")
    parser.add_argument("--context", type=int, help="tokens before the decoded ones (2048)")
    parser.add_argument("--steps", type=int, help="decode steps that are timed (50)")
    parser.add_argument("--not-deterministic", action="store_true")
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()
    args.batches = args.batches or ([1, 3] if args.tiny else [1, 8, 64, 256])
    args.prompts = args.prompts or ([5, 9] if args.tiny else [2048, 8192])
    args.context = args.context or (70 if args.tiny else 2048)
    args.steps = args.steps or (2 if args.tiny else 50)
    if args.device == "cpu":
        if not args.tiny:
            parser.error("--device cpu runs in an interpreter: it needs --tiny")
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"bench/engine_cuda.py needs a GPU, and torch {torch.__version__} finds none.", file=sys.stderr)
        return 2
    report = run(args)
    print(json.dumps(report))
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
