"""`python -m chaos --seed 1 --requests 1000`: the full run; exit status 1 when an answer is not exact or something leaks."""

from __future__ import annotations

import argparse
import asyncio
import sys

from builders import PlainDetokenizer, generate_alone
from chaos.arena import Shape
from chaos.faults import Kind, draw_plan
from chaos.report import report
from chaos.run import ChaosRun, Result, draw_requests
from workers.request import Request

CONFIG = {
    "model": "fake",
    "local_prefill_tokens": 0,
    "max_batch_tokens": 96,
    "max_num_seqs": 16,
    "transfer_timeout_s": 2.5,
}


def golden(request: Request) -> tuple[list[int], str]:
    """What an engine without company, network and faults answers."""
    tokens = generate_alone(request, 64, max_batch_tokens=512, max_model_len=4096)
    return tokens, "".join(PlainDetokenizer().push(token) for token in tokens)


async def run(
    seed: int, num_requests: int, transports: list[str], kinds: tuple[Kind, ...], concurrency: int, show: bool
) -> list[Result]:
    results = []
    for index, transport in enumerate(transports):
        count = num_requests // len(transports) + (index < num_requests % len(transports))
        plan = draw_plan(seed, transport, count, kinds)
        requests = draw_requests(seed, transport, count)
        if show:
            print("\n".join(f"{r.request_id}: {fault}" for r, fault in zip(requests, plan, strict=True)))
        chain = (transport,) if transport == "grpc" else (transport, "grpc")
        shape = Shape(3, 3, {**CONFIG, "transports": chain})
        results.append(await ChaosRun(shape, requests, plan, golden, concurrency).run(transport))
        print(
            f"{transport}: {'good' if results[-1].is_good else 'NOT GOOD'} after {results[-1].seconds:.0f} s",
            flush=True,
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--transports", default="shm,grpc")
    parser.add_argument("--kinds", default="", help="only these faults, separated by commas")
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--plan", action="store_true", help="print the plan")
    args = parser.parse_args()
    kinds = tuple(Kind(name) for name in args.kinds.split(",")) if args.kinds else tuple(Kind)
    results = asyncio.run(run(args.seed, args.requests, args.transports.split(","), kinds, args.concurrency, args.plan))
    print(report(results, args.seed, kinds))
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
