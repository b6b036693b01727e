"""`baton profile`: measures a real worker on this machine, or shows the profile of published hardware, as JSON for `baton simulate` and `baton plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.flags import add_cluster_flags, config_from
from workers.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.sim.measuring.measuring import MeasuredWorker

MAX_BESIDE = 64


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure a worker for the simulator",
        description="Measures a worker's steps, KV transfer and overheads on this machine and writes them as a profile for `baton "
        "simulate` and `baton plan`. With --published it writes that of known hardware instead, to be looked at and changed.",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the JSON; default: standard output")
    parser.add_argument("--name", default="", help="the profile's name; default: model, dtype and machine")
    parser.add_argument(
        "--published",
        metavar="NAME",
        help="such as h200:21B-A3B:bf16:tp1; nothing is measured; docs/capacity.md lists them",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="how often everything is measured; lower quartiles count; default: 5",
    )
    parser.add_argument(
        "--beside",
        type=int,
        default=0,
        metavar="N",
        help="processes that compute the same model meanwhile, as the machine's other workers will; default: 0",
    )
    parser.add_argument(
        "--engine-only",
        action="store_true",
        help="leave out what serving adds to steps, which takes two more processes with the model",
    )
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.published:
        from cluster.sim.profiles.files import published_file

        _write(published_file(args.published), args.out)
        return 0
    if not 1 <= args.rounds <= 1000:
        raise InvalidConfig(f"--rounds must be from 1 to 1000; it is {args.rounds}")
    if not 0 <= args.beside <= MAX_BESIDE:
        raise InvalidConfig(f"--beside must be from 0 to {MAX_BESIDE}; it is {args.beside}")
    from cluster.console.output import StepPrinter
    from cluster.preflight import check_model
    from cluster.sim.measuring.measuring import measure

    worker = config_from(args).worker
    check_model(worker.model)
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise InvalidConfig(f"--out {args.out} names a folder that does not exist")
    progress = StepPrinter()
    found = measure(worker, args.rounds, args.beside, not args.engine_only, progress.say)
    name = args.name or f"{found.info.name} {worker.dtype} on {worker.device}"
    _write(found.document(name), args.out)
    progress.say(summary(found))
    return 0


def summary(found: MeasuredWorker) -> str:
    """What was found, in a few lines."""
    over, fit = found.overheads, found.fit
    cost = found.cost
    decode = ", ".join(f"{batch}: {cost.step_s(0, 0, batch, batch * 512) * 1000:.2f} ms" for batch in (1, 8, 32))
    chunk = found.config.max_batch_tokens
    prefill = chunk / cost.step_s(chunk, chunk * (chunk + 1) // 2, 0, 0)
    return "\n".join(
        (
            f"{len(found.steps)} kinds of steps; the fit is off by {fit.typical_error:.1%} in the middle, {fit.large_error:.1%} at nine in ten",
            f"prefill {prefill:,.0f} tokens/s in chunks of {chunk}; decode steps at 512 tokens, by batch: {decode}",
            f"KV {over.transfer_bytes_per_s / 1e9:.2f} GB/s by {over.transport or 'no transport'}, control message "
            f"{over.control_latency_s * 1000:.2f} ms, router and streams {over.router_s * 1000:.2f} ms a hop",
        )
    )


def _write(document: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(document, indent=1)
    if out is None:
        print(text)
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"--out {out} cannot be written: {error.strerror}") from None
