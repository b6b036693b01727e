"""`baton simulate`: what a cluster would do with a trace, told by the product itself under a virtual clock."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.roles.config import RolesConfig
    from cluster.sim.load import TraceRequest
    from cluster.sim.profiles.profile import Profile
    from cluster.sim.record import RunRecord
    from cluster.sim.settings import Settings

DEFAULT_PROFILE = "h200:21B-A3B:bf16:tp1"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "simulate",
        help="what a cluster would do with a trace, by running its router, workers and engines in virtual time",
        description="Runs router, worker cores, engines and handoffs of the product under a virtual clock; model steps cost what a "
        "profile of the hardware says. docs/simulator.md tells what is simulated and what is approximated.",
    )
    parser.add_argument(
        "--trace",
        default="generated",
        metavar="FILE",
        help="a .jsonl of Mooncake or a .csv of Azure, or generated:requests=1000,rate=4,prompt=4000,output=300,...; default: generated",
    )
    parser.add_argument("--requests", type=int, metavar="N", help="the first N requests only")
    parser.add_argument(
        "--copies", type=int, default=1, metavar="N", help="each request N times, by users with nothing in common"
    )
    parser.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="requests come X times as fast as in the trace"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="how many; default: those of the split, or 1")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--split", metavar="P:D[:M]", help="prefill, decode and mixed workers")
    split.add_argument("--mixed", action="store_true", help="all workers do both; the default")
    parser.add_argument("--routers", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--roles",
        choices=("off", "advise", "auto"),
        help="the routers' role controllers; default: roles stay as they are",
    )
    parser.add_argument("--policy", metavar="NAME", help="of the router; default: the product's")
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        metavar="NAME|FILE",
        help=f"what a worker costs; default: {DEFAULT_PROFILE}",
    )
    parser.add_argument("--faults", metavar="FILE", help="what goes wrong when: lines or JSON (docs/simulator.md)")
    parser.add_argument("--random-faults", type=int, default=0, metavar="N", help="so many faults, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument(
        "--slo", metavar="ttft=S,tpot=S", help="targets of every request in seconds; what meets them is goodput"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as router.max_queue=100000"
    )
    parser.add_argument(
        "--leap",
        type=float,
        default=1.0,
        metavar="S",
        help="take decode steps together for up to S seconds; 0: one by one",
    )
    parser.add_argument(
        "--parts", type=int, default=1, metavar="N", help="parts in which a KV block travels; default: 1"
    )
    parser.add_argument("--json", metavar="FILE", help="write the summary as JSON")
    parser.add_argument("--record", metavar="FILE", help="write every request and sample as JSON lines")
    parser.add_argument("--html", metavar="FILE", help="write a page with charts")
    parser.add_argument("--png", metavar="FILE", help="write plots")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.sim.faults import random_faults, read_faults
    from cluster.sim.simulation import Simulation

    settings = settings_of(args)
    requests = trace_of(args, settings.profile)
    faults = read_faults(Path(args.faults)) if args.faults else []
    names = {name for name, _ in settings.workers} | set(settings.routers)
    for fault in faults:
        unknown = sorted((fault.targets | set(filter(None, fault.others.split(",")))) - names)
        if unknown:
            raise InvalidConfig(
                f"{args.faults}: there is no {unknown[0]} in this cluster; it has {', '.join(sorted(names)[:8])}"
            )
    if args.random_faults:
        import random

        rng = random.Random(args.seed)
        workers = [name for name, _ in settings.workers]
        faults = [
            *faults,
            *random_faults(rng, workers, settings.routers, requests[-1].at_s / args.speed, args.random_faults),
        ]
    simulation = Simulation(settings, _scaled(requests, args), faults)
    record = _with_bar(simulation, len(requests) * args.copies)
    record.settings["trace"] = args.trace
    _write(record, args)
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The cluster that the flags describe. Raises InvalidConfig."""
    from cluster.settings import override
    from cluster.sim.profiles.files import load_profile
    from cluster.sim.settings import Settings
    from router.config import RouterConfig
    from workers.config import WorkerConfig

    profile = load_profile(args.profile)
    given = override({}, args.set)
    unknown = sorted(set(given) - {"router", "worker", "roles"})
    if unknown:
        raise InvalidConfig(f"--set takes settings of router, worker and roles; {unknown[0]} is none")
    router = _given(given, "router")
    if args.policy:
        router["policy"] = args.policy
    num_prefill, num_decode, num_mixed = _split(args)
    ttft_s, tpot_s = targets_of(args.slo, profile)
    if args.routers < 1 or args.parts < 1 or args.leap < 0 or args.copies < 1 or not args.speed > 0:
        raise InvalidConfig("--routers, --parts and --copies take at least 1, --leap at least 0, --speed more than 0")
    return Settings(
        profile=profile,
        num_prefill=num_prefill,
        num_decode=num_decode,
        num_mixed=num_mixed,
        num_routers=args.routers,
        seed=args.seed,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        roles=_roles(args.roles, _given(given, "roles")),
        router=_built(RouterConfig, {}, router),
        worker=_built(WorkerConfig, {"max_num_seqs": 1}, _given(given, "worker")),
        num_parts=args.parts,
        max_leap_s=args.leap,
        sample_interval_s=max(1.0, (num_prefill + num_decode + num_mixed) / 64),
    )


def _roles(mode: str | None, given: dict[str, Any]) -> RolesConfig | None:
    """None: there are no role controllers. Raises InvalidConfig."""
    from cluster.roles.config import RolesConfig
    from cluster.settings import build

    if mode is None and not given:
        return None
    return build(RolesConfig, {**given, **({"mode": mode} if mode is not None else {})})


def _given(given: dict[str, Any], part: str) -> dict[str, Any]:
    values = given.get(part, {})
    if not isinstance(values, dict):
        raise InvalidConfig(f"--set {part} needs the name of a setting, such as {part}.max_queue=100")
    return dict(values)


def _built(config: type, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, with their types, once they have been checked. Raises InvalidConfig."""
    from cluster.settings import build

    built: Any = build(config, {"model": "simulated", **defaults, **given})
    return {name: getattr(built, name) for name in given}


def _split(args: argparse.Namespace) -> tuple[int, int, int]:
    """Prefill, decode and mixed workers. Raises InvalidConfig."""
    if args.split is None:
        if args.workers is not None and args.workers < 1:
            raise InvalidConfig(f"--workers takes at least 1; it is {args.workers}")
        return 0, 0, args.workers or 1
    parts = args.split.split(":")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise InvalidConfig(
            f"--split takes PREFILL:DECODE or PREFILL:DECODE:MIXED, such as 16:48; it is {args.split!r}"
        )
    num_prefill, num_decode, num_mixed = (*map(int, parts), 0)[:3]
    total = num_prefill + num_decode + num_mixed
    if args.workers is not None and args.workers != total:
        raise InvalidConfig(f"--split {args.split} makes {total} workers, and --workers says {args.workers}")
    return num_prefill, num_decode, num_mixed


def targets_of(text: str | None, profile: Profile) -> tuple[float | None, float | None]:
    """TTFT and TPOT in seconds. Raises InvalidConfig for what is no SLO, and for one that no worker could meet."""
    targets: dict[str, float] = {}
    for word in filter(None, (text or "").split(",")):
        name, _, value = word.partition("=")
        try:
            targets[name] = float(value)
        except ValueError:
            targets[name] = -1.0
        if name not in ("ttft", "tpot") or not 0 < targets[name] < 1e6:
            raise InvalidConfig(f"--slo takes seconds such as ttft=2,tpot=0.05; {word!r} is none")
    fastest = {"ttft": profile.step_s(1, 1, 0, 0) + 2 * profile.router_s, "tpot": profile.step_s(0, 0, 1, 1)}
    for name, seconds in targets.items():
        if seconds < fastest[name]:
            raise InvalidConfig(
                f"no worker can meet {name}={seconds:g}: with {profile.name} it takes {fastest[name]:.4g} s at the least"
            )
    return targets.get("ttft"), targets.get("tpot")


def trace_of(args: argparse.Namespace, profile: Profile) -> list[TraceRequest]:
    """Raises InvalidConfig."""
    from cluster.sim.traces.files import read_trace
    from cluster.sim.traces.generated import PREFIX, generate, recipe_of

    if args.requests is not None and args.requests < 1:
        raise InvalidConfig(f"--requests takes at least 1; it is {args.requests}")
    if args.trace.partition(":")[0] == PREFIX:
        requests = list(generate(recipe_of(args.trace), args.seed, profile.max_model_len))
    else:
        requests = read_trace(Path(args.trace))
    return requests[: args.requests]


def _scaled(requests: Iterable[TraceRequest], args: argparse.Namespace) -> Iterator[TraceRequest]:
    from cluster.sim.traces.files import scaled

    return scaled(requests, args.copies, args.speed)


def _with_bar(simulation: Any, num_requests: int) -> RunRecord:
    """Runs it behind a progress bar with an estimate, where somebody watches."""
    from tqdm import tqdm

    with tqdm(total=num_requests, unit=" requests", disable=None, smoothing=0.1) as bar:

        def tell(now: float, num_ended: int) -> None:
            bar.set_postfix_str(f"virtual {now:,.0f} s", refresh=False)
            bar.update(num_ended - bar.n)

        record: RunRecord = simulation.run(tell)
        bar.update(num_requests - bar.n)
    return record


def _write(record: RunRecord, args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from cluster.sim.report.page import page
    from cluster.sim.report.plots import write_plots
    from cluster.sim.report.summary import summarize
    from cluster.sim.report.table import summary_table

    summary = summarize(record)
    print(summary_table(summary))
    if args.json:
        _save(
            args.json,
            json.dumps({"settings": record.settings, "seed": record.seed, **asdict(summary)}, indent=1) + "\n",
        )
    if args.record:
        _save(args.record, "".join(f"{line}\n" for line in record.lines()))
    if args.html:
        _save(args.html, page(record))
    if args.png:
        write_plots(record, Path(args.png))


def _save(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"cannot write {path}: {error.strerror}") from error
