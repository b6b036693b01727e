"""`baton chat`: a conversation in the terminal, streamed from a running router."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO

from cluster.commands.flags import add_client_flags, client_target
from workers.errors import BatonError

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "chat", help="talk to a running cluster", description=f"Talks to a running cluster; {_HELP}."
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer; default: 256")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--system", metavar="TEXT", help="a system message that the conversation starts with")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.console.router_client import RouterClient

    url, api_key = client_target(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    options: dict[str, Any] = {"max_tokens": args.max_tokens}
    if args.temperature is not None:
        options["temperature"] = args.temperature
    messages = list(opening)
    with RouterClient(url, api_key) as router:
        if sys.stdin.isatty():
            print(_HELP)
        for line in _questions(sys.stdin):
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _print_answer(router.stream_chat(messages, options))
            except BatonError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"\nbaton: {error}", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
    return 0


def _questions(stream: TextIO) -> Iterator[str]:
    """Lines that are not blank; from a terminal with a prompt and, where there is one, line editing."""
    if not stream.isatty():
        yield from (line.strip() for line in stream if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines once it is imported)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _print_answer(pieces: Iterator[str]) -> str:
    """Prints the pieces as they come; Ctrl-C in a terminal ends the answer, not the conversation."""
    answer = []
    try:
        for piece in pieces:
            answer.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print(flush=True)
    return "".join(answer)
