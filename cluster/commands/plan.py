"""`baton plan`: how many workers a load needs, of which layout and in which split, found by simulating the product."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workers.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.sim.planning.plan import Candidate

LAYOUTS = ("tp1", "tp2", "ep2", "tp4", "ep4", "ep4-tp4", "ep8", "ep8-tp8", "ep16", "ep32")
"""What is tried when no layout is named: the smallest ones that hold the model."""
MAX_LAYOUTS = 2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="how many workers a load needs",
        description="Simulates a trace on clusters of different sizes, layouts and splits, and says what keeps the targets with the "
        "fewest accelerators, why, and what one lost worker costs.",
    )
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="Mooncake JSON lines or Azure CSV")
    parser.add_argument("--slo", required=True, metavar="TARGETS", help="in seconds, such as ttft=2,tpot=0.05")
    parser.add_argument("--hardware", metavar="NAME", help="h800, h200 or b200")
    parser.add_argument("--model", default="", metavar="NAME", help="0.3B, 21B-A3B or 300B-A47B")
    parser.add_argument("--dtype", default="bf16", metavar="NAME", help="bf16, wint8, wint4 or fp8; default: bf16")
    parser.add_argument(
        "--layout", action="append", default=[], metavar="NAME", help="such as tp1, ep8 or ep8-tp2; may be repeated; default: the "
        "smallest that hold the model",
    )  # fmt: skip
    parser.add_argument(
        "--profile", metavar="FILE", help="a measured or changed profile, instead of hardware, dtype and layout"
    )
    parser.add_argument(
        "--attain", type=float, default=0.95, metavar="SHARE", help="of the requests within targets; default: 0.95"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=1000,
        metavar="N",
        help="the trace's busiest so many requests in a row; default: 1000",
    )
    parser.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="the trace so many times as fast; default: 1"
    )
    parser.add_argument("--max-workers", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also the curves as PNG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.sim.planning.question import read_slo

    slo = read_slo(args.slo)
    for flag, value, low, high in (
        ("--attain", args.attain, 0.01, 1.0),
        ("--requests", args.requests, 10, 100_000),
        ("--speed", args.speed, 0.001, 1000.0),
        ("--max-workers", args.max_workers, 1, 4096),
    ):
        if not low <= value <= high:
            raise InvalidConfig(f"{flag} must be from {low:g} to {high:g}; it is {value:g}")
    if args.plot is not None:
        from cluster.sim.report.plots import new_figure

        new_figure(1, 1)  # said now rather than after minutes
    candidates = candidates_of(args)

    from cluster.console.output import StepPrinter
    from cluster.sim.planning.plan import make_plan
    from cluster.sim.planning.question import busiest
    from cluster.sim.planning.simulated import Simulated
    from cluster.sim.planning.text import plan_text, write_plan_plot
    from cluster.sim.traces.files import read_trace, scaled

    whole = read_trace(args.trace)
    first, last = busiest(whole, args.requests)
    begin_s = whole[first].at_s
    used = [replace(request, at_s=request.at_s - begin_s) for request in whole[first:last]]
    trace = list(scaled(used, 1, args.speed))
    progress = StepPrinter()
    simulated = Simulated(trace, slo, args.seed, progress.say)
    try:
        plan = make_plan(
            candidates, trace, slo, args.attain, args.max_workers, simulated.of,
            assumptions(args, len(whole), len(trace), begin_s), progress.say,
        )  # fmt: skip
    finally:
        simulated.close()
    print(json.dumps(plan.as_json(), indent=1) if args.json else plan_text(plan))
    if args.plot is not None:
        write_plan_plot(plan, args.plot)
    return 0


def candidates_of(args: argparse.Namespace) -> list[Candidate]:
    """The profiles that are compared. Raises InvalidConfig when none can hold the model."""
    from cluster.sim.planning.plan import Candidate
    from cluster.sim.profiles.accelerators import accelerator
    from cluster.sim.profiles.files import load_profile, require_model
    from cluster.sim.profiles.models import published_model, weight_type
    from cluster.sim.profiles.published import published_profile
    from cluster.sim.profiles.roofline import RooflineCost

    def candidate(name: str) -> Candidate:
        profile = load_profile(name)
        require_model(profile, args.model)
        return Candidate(profile, profile.cost.parallel.size if isinstance(profile.cost, RooflineCost) else 1)

    if args.profile:
        if args.hardware or args.layout:
            raise InvalidConfig("--profile says hardware and layout itself: leave --hardware and --layout out")
        return [candidate(args.profile)]
    if not args.hardware or not args.model:
        raise InvalidConfig("a plan needs --hardware and --model, or --profile")
    accelerator(args.hardware), published_model(args.model), weight_type(args.dtype)
    base = f"{args.hardware}:{args.model}:{args.dtype}"
    if args.layout:
        return [candidate(f"{base}:{layout}") for layout in args.layout]
    found: list[Candidate] = []
    reason = ""
    for layout in LAYOUTS:
        try:
            profile = published_profile(f"{base}:{layout}")
        except InvalidConfig as error:
            reason = str(error)
            continue
        assert isinstance(profile.cost, RooflineCost)
        found.append(Candidate(profile, profile.cost.parallel.size))
        if len(found) == MAX_LAYOUTS:
            break
    if not found:
        raise InvalidConfig(reason)
    return found


def assumptions(args: argparse.Namespace, num_whole: int, num_used: int, begin_s: float) -> list[str]:
    """What the answer rests on, in words."""
    source = (
        f"steps cost what the profile {args.profile} says"
        if args.profile
        else "steps cost a roofline over data sheets with the efficiencies of docs/capacity.md: not measured on these accelerators"
    )
    used = (
        "the whole trace"
        if num_used == num_whole
        else f"the busiest {num_used} of its {num_whole} requests in a row, from {begin_s:.0f} s on"
    )
    pace = "" if args.speed == 1 else f", {args.speed:g} times as fast"
    return [
        source,
        f"the load is {used}{pace}; a longer or burstier one needs more",
        "routing, batching, KV and handoffs are the product's own, with its default settings; all workers are alike and near each other",
        "nothing fails and no role changes meanwhile; a lost worker is shown as a cluster that begins without it",
        f"sampling and outputs do not depend on load; arrivals do not wait for answers; seed {args.seed}",
    ]
