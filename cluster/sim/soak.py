"""Runs small random clusters under random loads and faults, seed by seed: `python -m cluster.sim.soak --seeds 1:2000`. A seed that fails is one command away."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence

from cluster.sim.faults import Fault, random_faults
from cluster.sim.load import TraceRequest
from cluster.sim.product import InvalidConfig
from cluster.sim.profiles.profile import LinearCost, Profile
from cluster.sim.record import RunRecord
from cluster.sim.settings import Settings
from cluster.sim.simulation import Notice, Simulation
from cluster.sim.traces.generated import Recipe, generate

LAST_EVENTS = 40
REPLAY = "python -m cluster.sim.soak --seed"
ALLOWED = {"ok", "cancelled", "no_workers", "queue_full", "deadline_exceeded", "workers_died"}
"""How a request may end when workers die, stand still and are cut off for longer than anybody waits, two of them in a row under it
(router.max_lost_workers)."""


def case_of(seed: int) -> tuple[Settings, list[TraceRequest], list[Fault]]:
    """Everything of one seed."""
    rng = random.Random(f"{seed}/soak")
    profile = Profile(
        cost=LinearCost(base_s=rng.choice((0.004, 0.02))),
        num_blocks=rng.choice((48, 96, 400, 4000)),
        max_num_seqs=rng.choice((4, 16, 64)),
        max_batched_tokens=rng.choice((128, 512, 4096)),
        max_model_len=2048,
        transfer_bytes_per_s=rng.choice((1e9, 40e9)),
        kv_bytes_per_token=8192,
    )
    num_prefill, num_decode, num_mixed = rng.choice(((1, 1, 0), (2, 2, 0), (1, 3, 0), (0, 0, 3), (1, 2, 1), (0, 1, 1)))
    settings = Settings(
        profile=profile,
        num_prefill=num_prefill,
        num_decode=num_decode,
        num_mixed=num_mixed,
        num_routers=rng.choice((1, 1, 2)),
        seed=seed,
        num_parts=rng.choice((1, 4)),
        max_leap_s=rng.choice((0.0, 0.3, 1.0)),
        check_interval=rng.choice((5, 20, 100)),
        router={"max_migrations": 4, "rebalance_gap": rng.choice((2, 8)), "rebalance_cooldown_s": 0.5},
        worker={"orphan_grace_s": rng.choice((0.0, 5.0, 30.0)), "max_kept_tokens": rng.choice((16, 8192))},
    )
    recipe = Recipe(
        requests=rng.choice((10, 40)),
        rate=rng.choice((2.0, 10.0)),
        prompt=rng.choice((100, 600)),
        output=rng.choice((20, 120)),
        pause=1.0,
        hangups=rng.choice((0.0, 0.2)),
        shared=rng.choice((0, 512)),
    )
    trace = list(generate(recipe, seed, profile.max_model_len))
    names = [name for name, _ in settings.workers]
    faults = random_faults(rng, names, settings.routers, trace[-1].at_s + 5.0, rng.choice((0, 2, 6)))
    return settings, trace, faults


def run_seed(seed: int, notice: Notice | None = None) -> RunRecord:
    """One case to its end. Raises InvariantViolated, or whatever else broke in it."""
    settings, trace, faults = case_of(seed)
    run = Simulation(settings, trace, faults, notice).run()
    wrong = {request.outcome for request in run.requests} - (ALLOWED if faults else {"ok", "cancelled"})
    if wrong:
        raise AssertionError(f"requests ended with {', '.join(sorted(wrong))}")
    return run


def try_seed(seed: int) -> str:
    """Empty when the seed passes, else how to see it again and what came last."""
    last: deque[str] = deque(maxlen=LAST_EVENTS)
    try:
        run_seed(seed, lambda now, text: last.append(f"{now:10.3f}  {text}"))
    except Exception:
        return "\n".join((f"seed {seed} fails; again: {REPLAY} {seed}", *last, traceback.format_exc()))
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulates small random clusters under random faults.")
    parser.add_argument("--seeds", default="1:1001", metavar="FIRST:END", help="default: 1:1001")
    parser.add_argument("--seed", type=int, help="this one alone, with what happens in it")
    args = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    if args.seed is not None:
        logging.disable(logging.NOTSET)
        settings, trace, faults = case_of(args.seed)
        print(settings, f"{len(trace)} requests", *faults, sep="\n")
        run_seed(args.seed, lambda now, text: print(f"{now:10.3f}  {text}"))
        return 0
    first, _, end = args.seeds.partition(":")
    if not (first.isdecimal() and end.isdecimal()):
        raise InvalidConfig(f"--seeds takes FIRST:END, such as 1:1001; it is {args.seeds!r}")
    num_failed, began_s = 0, time.monotonic()
    for seed in range(int(first), int(end)):
        why = try_seed(seed)
        num_failed += bool(why)
        if why:
            print(why, flush=True)
        if seed % 100 == 0:
            print(f"seed {seed}: {num_failed} failed, {time.monotonic() - began_s:.0f} s", flush=True)
    print(f"seeds {args.seeds}: {num_failed} failed in {time.monotonic() - began_s:.0f} s")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
