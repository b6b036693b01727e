"""Throughput, TTFT and TPOT of a running cluster over a replayed trace; prints a table, and JSON with --json.

baton serve &
python bench/serve.py --requests 200 --rate 4
python bench/serve.py --trace mooncake_conversation.jsonl --requests 200 --rate 4 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import urllib.error
import urllib.request
from typing import Any

from sse_client import Measured, stream_completion
from traces import TraceRequest, generate, prompt_tokens, read_trace, scale

PERCENTILES = (50, 90, 99)


def percentile(values: list[float], percent: float) -> float:
    """Nearest-rank percentile; NaN for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]


async def replay(
    url: str, model: str, requests: list[TraceRequest], vocab_size: int, args: argparse.Namespace
) -> list[Measured]:
    """Sends each request at its time, at most --concurrency at once; arrivals wait when that many are running."""
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(args.concurrency)
    start = loop.time()

    async def one(index: int, request: TraceRequest) -> Measured:
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt_tokens(request, index, vocab_size, args.seed),
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "return_token_ids": True,
            "trace": True,
        }
        await asyncio.sleep(max(0.0, start + request.arrival_s - loop.time()))
        async with slots:
            return await stream_completion(url, body, args.api_key)

    return list(await asyncio.gather(*(one(index, request) for index, request in enumerate(requests))))


def summarize(measured: list[Measured], requests: list[TraceRequest], goodput: tuple[float, float]) -> dict[str, Any]:
    """Figures of one run. TPOT is (last token - first token) / (tokens - 1) of a request, in milliseconds."""
    good = [m for m in measured if not m.error and m.token_times_s]
    ttft = [(m.token_times_s[0] - m.started_s) * 1000 for m in good]
    tpot: list[float] = []
    num_good = 0
    for m, first in zip(good, ttft, strict=True):
        tokens = m.usage.get("completion_tokens", 0)
        own = (m.token_times_s[-1] - m.token_times_s[0]) * 1000 / (tokens - 1) if tokens > 1 else None
        if own is not None:
            tpot.append(own)
        num_good += first <= goodput[0] and (own is None or own <= goodput[1])
    gaps = [(b - a) * 1000 for m in good for a, b in zip(m.token_times_s, m.token_times_s[1:], strict=False)]
    span = max((m.ended_s for m in measured), default=0.0) - min((m.started_s for m in measured), default=0.0)
    output_tokens = sum(m.usage.get("completion_tokens", 0) for m in good)
    input_tokens = sum(m.usage.get("prompt_tokens", 0) for m in good)
    handoffs = [c for m in good for c in m.trace.get("choices", ())]
    remote = [c for c in handoffs if c["transport"] != "local"]
    wrong = sum(m.usage.get("completion_tokens") != r.output_tokens for m, r in zip(measured, requests, strict=True))
    return {
        "requests": len(measured),
        "failed": len(measured) - len(good),
        "wrong_length": wrong,
        "duration_s": round(span, 3),
        "requests_per_s": round(len(good) / span, 3) if span else 0.0,
        "input_tokens_per_s": round(input_tokens / span, 1) if span else 0.0,
        "output_tokens_per_s": round(output_tokens / span, 1) if span else 0.0,
        "cached_input_share": round(sum(c["cached_tokens"] for c in handoffs) / input_tokens, 3) if input_tokens else 0,
        "ttft_ms": {f"p{p}": round(percentile(ttft, p), 2) for p in PERCENTILES},
        "tpot_ms": {f"p{p}": round(percentile(tpot, p), 2) for p in PERCENTILES},
        "itl_ms": {f"p{p}": round(percentile(gaps, p), 2) for p in PERCENTILES},
        "goodput_share": round(num_good / len(measured), 3) if measured else 0.0,
        "goodput_slo_ms": {"ttft": goodput[0], "tpot": goodput[1]},
        "handoffs": {
            "remote": len(remote),
            "local": len(handoffs) - len(remote),
            "transports": sorted({c["transport"] for c in remote}),
            "kv_mib": round(sum(c["kv_bytes"] for c in remote) / 2**20, 2),
            "transfer_ms_mean": round(statistics.fmean(c["transfer_s"] for c in remote) * 1000, 3) if remote else 0.0,
        },
    }


def print_table(result: dict[str, Any], settings: dict[str, Any]) -> None:
    print("  ".join(f"{key} {value}" for key, value in settings.items()))
    for name in ("requests", "failed", "duration_s", "requests_per_s", "input_tokens_per_s", "output_tokens_per_s"):
        print(f"{name:<22}{result[name]:>12}")
    print(f"{'cached_input_share':<22}{result['cached_input_share']:>12}")
    print(f"{'goodput_share':<22}{result['goodput_share']:>12}   (SLO: {result['goodput_slo_ms']} ms)")
    print(f"\n{'':<10}" + "".join(f"{'p' + str(p):>10}" for p in PERCENTILES))
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        print(f"{name:<10}" + "".join(f"{value:>10}" for value in result[name].values()))
    print("\nhandoffs  " + "  ".join(f"{key} {value}" for key, value in result["handoffs"].items()))


def get_json(url: str, api_key: str) -> Any:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return json.load(answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--trace", help="Mooncake .jsonl or Azure .csv; without it, a seeded generator")
    parser.add_argument("--requests", type=int, default=100, help="how many of the trace's first requests")
    parser.add_argument("--rate", type=float, help="requests per second on average (default: as recorded)")
    parser.add_argument("--max-len", type=int, help="scale lengths to this context instead of the model's")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args()
    args.api_key = os.environ.get("BATON_API_KEY", "")
    try:
        card = get_json(f"{args.url}/v1/models", args.api_key)["data"][0]
        workers = get_json(f"{args.url}/admin/status", os.environ.get("BATON_ADMIN_KEY", ""))["workers"]
    except (urllib.error.URLError, OSError) as error:
        print(f"no cluster answers at {args.url} ({error}): start one with `make serve`", file=sys.stderr)
        return 2
    vocab_size = workers[0]["status"]["model"]["vocab_size"]
    trace = read_trace(args.trace) if args.trace else generate(args.requests, args.seed)
    requests = scale(trace[: args.requests], args.max_len or card["max_model_len"], args.rate)
    measured = asyncio.run(replay(args.url, card["id"], requests, vocab_size, args))
    result = summarize(measured, requests, (args.slo_ttft_ms, args.slo_tpot_ms))
    settings = {
        "model": card["id"],
        "trace": args.trace.rsplit("/", 1)[-1] if args.trace else f"generated (seed {args.seed})",
        "workers": " ".join(f"{w['status']['worker_id']}:{w['status']['role']}" for w in workers),
        "rate": args.rate or "as recorded",
    }
    if args.json:
        print(json.dumps({"settings": settings} | result))
    else:
        print_table(result, settings)
    for m in measured:
        if m.error:
            print(f"failed: {m.error}", file=sys.stderr)
            break
    return 1 if result["failed"] or result["wrong_length"] else 0


if __name__ == "__main__":
    sys.exit(main())
