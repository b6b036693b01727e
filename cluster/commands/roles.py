"""`baton roles`: which worker has which role and why, and which ones the role controller leaves alone."""

from __future__ import annotations

import argparse
import json

from cluster.commands.flags import add_admin_flags, client_target


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    roles = commands.add_parser(
        "roles",
        help="show the workers' roles and what decides on them",
        description="Shows each worker's role, the one that is wanted, since when and by whom; with --explain the last decisions with what "
        "they were made from, the alternatives, and what came of them (docs/roles.md).",
    )
    what = roles.add_mutually_exclusive_group()
    what.add_argument("--explain", action="store_true", help="the last decisions and steps")
    what.add_argument("--json", action="store_true", help="all of it as the router answers it")
    what.add_argument("--pin", metavar="WORKER", help="keep a worker in its role")
    what.add_argument("--unpin", metavar="WORKER", help="let the role controller have it again")
    add_admin_flags(roles)
    roles.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.console.roles_page import explanation, roles_table
    from cluster.console.router_client import RouterClient

    with RouterClient(*client_target(args), timeout_s=90.0) as router:
        if args.pin or args.unpin:
            router.set_pinned(args.pin or args.unpin, bool(args.pin))
            print(f"{args.pin} stays as it is" if args.pin else f"{args.unpin} may be switched again")
            return 0
        page = router.roles()
    if args.json:
        print(json.dumps(page, indent=2, ensure_ascii=False))
    else:
        print(explanation(page) if args.explain else roles_table(page))
    return 0
