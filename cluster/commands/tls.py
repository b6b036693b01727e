"""`baton tls`: makes an authority and certificates for clusters whose processes do not share a host, and further ones later."""

from __future__ import annotations

import argparse
from pathlib import Path

from workers.errors import InvalidConfig

DAYS = 365


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tls",
        help="make certificates for routers and workers",
        description="Makes the certificates that routers and workers show each other (docs/security.md).",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    init = actions.add_parser(
        "init", help="a new authority, and certificates", description="Makes an authority and certificates."
    )
    more = actions.add_parser(
        "add",
        help="certificates by an authority that is there",
        description="Makes certificates, or new ones in place of those that end.",
    )
    issue = actions.add_parser(
        "issue",
        help="certificates by an authority whose files are elsewhere",
        description="Makes certificates with an authority's files, as an init container does, and leaves its key where it is.",
    )
    issue.add_argument("--ca-cert", type=Path, required=True, metavar="FILE", help="the authority's certificate (PEM)")
    issue.add_argument("--ca-key", type=Path, required=True, metavar="FILE", help="its key (PEM, EC)")
    for action, is_new in ((init, True), (more, False), (issue, False)):
        action.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="folder for the files; nobody else may read it"
        )
        action.add_argument(
            "--worker", action="append", default=[], metavar="NAME", help="such as decode-0; may be repeated"
        )
        action.add_argument(
            "--router", action="append", default=[], metavar="NAME", help="such as router-0; may be repeated"
        )
        action.add_argument(
            "--no-admin", action="store_true", help="these routers may not switch roles and drain workers"
        )
        action.add_argument("--days", type=int, default=DAYS, metavar="N", help=f"how long they hold; default: {DAYS}")
        action.set_defaults(run=run, is_new=is_new)


def run(args: argparse.Namespace) -> int:
    from cluster.identity.folder import add, config_of, issue, make_folder, members
    from workers.trust.parties import ADMIN, OBSERVER

    if not 1 <= args.days <= 36500:
        raise InvalidConfig(f"--days must be 1 to 36500; it is {args.days}")
    folder = args.out.expanduser().resolve()
    own = members(args.worker, args.router, not args.no_admin)
    if args.is_new:
        make_folder(folder, [*own, (OBSERVER,), (ADMIN,)], args.days)
    elif not own:
        raise InvalidConfig("name what to make certificates for with --worker and --router")
    elif hasattr(args, "ca_key"):
        issue(args.ca_cert, args.ca_key, folder, own, args.days)
    else:
        add(folder, own, args.days)
    files = config_of(folder)
    print(f"{folder}: {', '.join(parties[0].file_name for parties in own) or 'an authority'}, for {args.days} days")
    print(
        f"Copy ca.crt and a process's own two files to its host, never ca.key. Settings there:\n  tls.cert={files.cert}\n  tls.key={files.key}\n  tls.ca={files.ca}"
    )
    return 0
