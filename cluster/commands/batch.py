"""`baton batch`: answers a file of requests offline, in this process."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from cluster.commands.flags import add_cluster_flags, config_from


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests offline",
        description="Answers a file of requests, one JSON object a line with custom_id, url and body, as OpenAI's batch API does. A run that "
        "was interrupted goes on where its output file ends.",
    )
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="requests, one a line")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where answers are added")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """1 when some requests were answered with an error."""
    from cluster.batch import run_batch

    config = replace(config_from(args).worker, max_queue=1 << 20)
    num_answered, num_errors = run_batch(config, args.input, args.output, progress=not args.quiet)
    print(f"{num_answered} answers, {num_errors} of them errors, in {args.output}", file=sys.stderr)
    return 1 if num_errors else 0
