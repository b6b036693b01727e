"""`python -m chaos --seed 1 --requests 1000`: the full run; exit status 1 when an answer is not exact or something leaks."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

from chaos.faults import Kind
from chaos.report import report, summary
from chaos.routers import RouterRun
from chaos.run import Result
from chaos.scenarios import SHARES, Scenario, full


async def run(scenarios: Sequence[Scenario | RouterRun]) -> list[Result]:
    results = []
    for one in scenarios:
        result = await one.run()
        print(summary(result), flush=True)
        results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--arenas", default=",".join(SHARES), help="some of these, separated by commas")
    parser.add_argument("--kinds", default="", help="only these faults, separated by commas")
    parser.add_argument("--plan", action="store_true", help="print the plan, request by request")
    args = parser.parse_args()
    logging.getLogger("router.driver").setLevel(logging.CRITICAL)
    kinds = tuple(Kind(name) for name in args.kinds.split(",")) if args.kinds else tuple(Kind)
    scenarios = full(args.seed, args.requests, args.arenas.split(","), kinds)
    if args.plan:
        for one in scenarios:
            print("\n".join(f"{r.request_id}: {fault}" for r, fault in zip(one.requests, one.plan, strict=True)))
    results = asyncio.run(run(scenarios))
    print(report(results, args.seed, kinds))
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
