"""`baton doctor`: looks at this host and at a running cluster, and says what to do. Also what `helm test` runs."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict

from cluster.commands.flags import KEYS, add_cluster_flags, add_key_file, client_target, config_from, first_key


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this host and a running cluster",
        description="Looks at this host, the store, Ray and a router, and says what is wrong and what to do. Exit code 1 when something is wrong.",
    )
    parser.add_argument("--url", help="the router; default: $BATON_URL, else this host's cluster")
    for kind in KEYS:
        add_key_file(parser, kind)
    parser.add_argument("--ask", action="store_true", help="send a completion and a stream as well")
    parser.add_argument("--host-only", action="store_true", help="look at this host alone")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="Ray's head, where it is to be looked at")
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.doctor.findings import Finding, is_well
    from cluster.doctor.looking import ask, look_at_host, look_at_ports, look_at_ray, look_at_router, look_at_store

    keys = {kind: first_key(args, kind) for kind in KEYS}
    is_told = args.store or args.config or args.ray_address or args.assignments
    config = config_from(args) if is_told else None
    found: list[Finding] = look_at_host() + look_at_ports(config)
    if not args.host_only:
        url, _ = client_target(args)
        if config is not None:
            found += asyncio.run(look_at_store(config))
        found += look_at_ray(config.ray.address if config is not None else "")
        found += look_at_router(url, keys["admin"])
        if args.ask and is_well(found):
            found += ask(url, keys["api"], keys["admin"])
    if args.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print("\n".join(map(str, found)))
    return 0 if is_well(found) else 1
