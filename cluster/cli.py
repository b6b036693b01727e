"""The `baton` command: parses, runs one subcommand, and turns every operator error into one sentence and exit code 2.

Heavy modules (torch, ray) are imported by the subcommands that need them, so that help and status answer at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from cluster.commands import (
    admin,
    batch,
    chat,
    debug,
    demo,
    doctor,
    drain,
    info,
    join,
    keys,
    plan,
    profile,
    ray_nodes,
    roles,
    serve,
    simulate,
    stop,
    store,
    tls,
    usage,
)
from cluster.commands.flags import INTERRUPTED, OPERATOR_ERROR
from workers.errors import BatonError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a check failed, 2 an operator error, 3 Ray has died, 130 interrupted."""
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except BatonError as error:
        return _report(error, args.debug)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        sys.stderr.close()
        return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton", description="Serves ERNIE 4.5 from a cluster that splits prefill from decode."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.add_argument("--version", action=info.ShowVersion)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in (
        serve,
        stop,
        demo,
        chat,
        batch,
        admin,
        roles,
        drain,
        keys,
        usage,
        join,
        doctor,
        debug,
        ray_nodes,
        store,
        simulate,
        profile,
        plan,
        tls,
        info,
    ):
        module.add_parser(commands)
    return parser


def _report(error: BatonError, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"baton: {error}", file=sys.stderr)
    return int(getattr(error, "exit_code", OPERATOR_ERROR))


if __name__ == "__main__":
    sys.exit(main())
