"""`baton status` and `baton switch-role`: both ask a running router."""

from __future__ import annotations

import argparse
import json

from cluster.commands.flags import add_admin_flags, client_target


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser("status", help="show the workers of a running cluster")
    status.add_argument("--json", action="store_true", help="the router's answer as it is")
    add_admin_flags(status)
    status.set_defaults(run=run_status)
    switch = commands.add_parser("switch-role", help="switch a worker's role while it serves")
    switch.add_argument("worker", metavar="WORKER", help="such as decode-0")
    switch.add_argument("role", metavar="ROLE", choices=("prefill", "decode", "mixed"), help="prefill, decode or mixed")
    switch.add_argument("--force", action="store_true", help="even if nothing could prefill or decode afterwards")
    switch.add_argument(
        "--pin",
        action="store_true",
        help="keep it so: the role controller leaves the worker alone until `baton roles --unpin`",
    )
    add_admin_flags(switch)
    switch.set_defaults(run=run_switch)


def run_status(args: argparse.Namespace) -> int:
    from cluster.console.output import status_table
    from cluster.console.router_client import RouterClient

    with RouterClient(*client_target(args), timeout_s=10.0) as router:
        status = router.status()
    print(json.dumps(status, indent=2, ensure_ascii=False) if args.json else status_table(status))
    return 0


def run_switch(args: argparse.Namespace) -> int:
    from cluster.console.output import generation_text
    from cluster.console.router_client import RouterClient

    with RouterClient(*client_target(args)) as router:
        worker = router.set_role(args.worker, args.role, args.force, True if args.pin else None)
    print(f"{worker['worker_id']} is {worker['role']} now, generation {generation_text(int(worker['generation']))}")
    return 0
