"""`baton drain`: has a worker take no new work, and shows how what runs there moves away or ends."""

from __future__ import annotations

import argparse
import time
from typing import Any

from cluster.commands.flags import add_admin_flags, client_target
from workers.errors import BatonError

POLL_S = 0.3


class DrainTimeout(BatonError):
    """The worker still holds something; it drains on."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    drain = commands.add_parser(
        "drain",
        help="move requests away from a worker and give it no new ones",
        description="Has a worker take no new work, moves its running requests to others without changing a token, and returns "
        "when it holds nothing. It stays drained, over restarts too, until --undo.",
    )
    drain.add_argument("worker", metavar="WORKER", help="such as decode-1")
    drain.add_argument("--undo", action="store_true", help="let it take work again")
    drain.add_argument("--force", action="store_true", help="even if nothing else could prefill or decode")
    drain.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long to wait until it is empty; default: 120",
    )
    add_admin_flags(drain)
    drain.set_defaults(run=run_drain)


def run_drain(args: argparse.Namespace) -> int:
    from cluster.console.output import StepPrinter
    from cluster.console.router_client import RouterClient

    with RouterClient(*client_target(args)) as router:
        router.set_draining(args.worker, not args.undo, args.force)
        if args.undo:
            print(f"{args.worker} takes work again")
            return 0
        deadline = time.monotonic() + args.timeout
        progress, told = StepPrinter(), ""
        while (left := what_is_left(router.status(), args.worker)) != "":
            if time.monotonic() >= deadline:
                raise DrainTimeout(
                    f"{args.worker} still holds {left} after {args.timeout:g} s; it takes no new work and drains on"
                )
            if left != told:
                progress.say(f"{args.worker}: {left} left")
                told = left
            time.sleep(POLL_S)
    print(f"{args.worker} is drained: it holds nothing and takes no new work until `baton drain {args.worker} --undo`")
    return 0


def what_is_left(status: dict[str, Any], worker_id: str) -> str:
    """What a worker holds, in words, from the JSON of GET /admin/status; empty: nothing. A worker that has gone holds nothing."""
    for view in status["workers"]:
        worker = view["status"]
        if worker["worker_id"] != worker_id or not view["connected"]:
            continue
        load, counters = worker["load"], worker["counters"]
        requests = max(view["num_requests"], load["num_running"] + load["num_waiting"] + load["num_transferring"])
        counts = (
            (requests, "request"),
            (int(counters.get("held_blocks", 0)), "KV block"),
            (int(counters.get("running_transfers", 0)), "transfer"),
        )
        return ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count)
    return ""
