"""`baton keys`: makes keys for tenants, lists them, and ends them; a key is shown once, and only its hash leaves this process."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from cluster.commands.flags import add_admin_flags, client_target
from workers.errors import InvalidConfig

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "keys",
        help="API keys of tenants",
        description="Makes, lists, replaces and ends the keys of tenants of a running cluster (docs/tenants.md).",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    create = actions.add_parser("create", help="a new key, which is shown once")
    create.add_argument("--tenant", required=True, metavar="NAME", help="whose key it is")
    create.add_argument("--id", metavar="NAME", help="what it is called here; default: a random one")
    create.add_argument(
        "--expires", type=duration, metavar="TIME", help="it counts for so long, such as 90d; default: for ever"
    )
    create.set_defaults(run=run_create)
    shown = actions.add_parser("list", help="all keys, without the keys themselves")
    shown.add_argument("--json", action="store_true", help="the router's answer as it is")
    shown.set_defaults(run=run_list)
    revoke = actions.add_parser("revoke", help="a key counts no more")
    revoke.set_defaults(run=run_revoke)
    rotate = actions.add_parser("rotate", help="a new key in place of one, which counts for a while yet")
    rotate.add_argument(
        "--grace", type=duration, default=86400.0, metavar="TIME", help="for so long; default: 1d; 0s: not at all"
    )
    rotate.set_defaults(run=run_rotate)
    for action in (revoke, rotate):
        action.add_argument("id", metavar="ID", help="as `baton keys list` shows it")
    for action in (create, shown, revoke, rotate):
        add_admin_flags(action)


def duration(text: str) -> float:
    """Seconds of 90s, 15m, 1h, 30d. Raises what argparse tells as a wrong value."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([smhd])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a time is a number with s, m, h or d, such as 90d; it is {text!r}")
    return float(found[1]) * _SECONDS[found[2]]


def run_create(args: argparse.Namespace) -> int:
    _show_new(_create(args, args.tenant, args.id or "", args.expires))
    return 0


def run_list(args: argparse.Namespace) -> int:
    from cluster.console.output import table
    from cluster.console.router_client import RouterClient

    with RouterClient(*client_target(args)) as router:
        keys = router.keys()
    if args.json:
        print(json.dumps(keys, indent=2))
        return 0
    rows = [(key["id"], key["tenant"], state_of(key, time.time())) for key in keys["keys"]]
    print(table(("ID", "TENANT", "STATE"), rows) if rows else "no keys")
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    from cluster.console.router_client import RouterClient

    with RouterClient(*client_target(args)) as router:
        key = router.end_key(args.id, None)
    print(f"the key {key['id']} of {key['tenant']} counts no more")
    return 0


def run_rotate(args: argparse.Namespace) -> int:
    from cluster.console.router_client import RouterClient

    with RouterClient(*client_target(args)) as router:
        old = next((key for key in router.keys()["keys"] if key["id"] == args.id), None)
    if old is None:
        raise InvalidConfig(f"there is no key {args.id}; `baton keys list` shows those there are")
    if not old["stored"]:
        raise InvalidConfig(f"the key {args.id} stands in a file or in the settings: replace it there")
    if state_of(old, time.time()) != "valid" and not state_of(old, time.time()).startswith("until"):
        raise InvalidConfig(f"the key {args.id} counts no more: make a new one with `baton keys create`")
    left_s = old["expires_s"] - time.time() if old["expires_s"] else None
    new = _create(args, old["tenant"], "", left_s)
    with RouterClient(*client_target(args)) as router:
        router.end_key(args.id, time.time() + args.grace if args.grace else None)
    _show_new(new)
    return 0


def _create(args: argparse.Namespace, tenant: str, key_id: str, lasts_s: float | None) -> tuple[str, dict[str, Any]]:
    """A key, and what the router says of it."""
    from cluster.console.router_client import RouterClient

    key = f"baton-{secrets.token_urlsafe(32)}"
    body = {
        "id": key_id or f"key-{secrets.token_hex(4)}",
        "tenant": tenant,
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "expires_s": time.time() + lasts_s if lasts_s else None,
    }
    with RouterClient(*client_target(args)) as router:
        return key, router.create_key(body)


def _show_new(made: tuple[str, dict[str, Any]]) -> None:
    """The key alone on standard output, so that it can go straight into a file."""
    key, about = made
    state = state_of(about, time.time())
    print(f"key {about['id']} of tenant {about['tenant']}, {state}; it is not shown again:", file=sys.stderr)
    print(key)


def state_of(key: dict[str, Any], now_s: float) -> str:
    if key["revoked_s"]:
        return f"revoked {_day(key['revoked_s'])}"
    if key["expires_s"]:
        return f"{'until' if key['expires_s'] > now_s else 'expired'} {_day(key['expires_s'])}"
    return "valid"


def _day(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
