"""The child's side of a measured KV transport: commands come as JSON lines, results go back as JSON lines; standard library only."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from typing import Any


def replies() -> Any:
    """Where answers go; whatever a library prints goes to standard error from now on."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def serve(version: str, make_session: Callable[[], Any]) -> None:
    """Answers each command with the method on_<do> of a session, until standard input ends."""
    output = replies()
    session = make_session()
    print(json.dumps({"version": version}), file=output)
    for line in sys.stdin:
        print(json.dumps(_answer(session, json.loads(line))), file=output)


async def serve_async(version: str, session: Any) -> None:
    """As `serve`, for methods that are coroutines; the event loop runs on between commands."""
    output = replies()
    print(json.dumps({"version": version}), file=output)
    reader = asyncio.StreamReader(1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command = json.loads(line)
        try:
            reply = await getattr(session, "on_" + command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=output)


def _answer(session: Any, command: dict[str, Any]) -> dict[str, Any]:
    try:
        reply: dict[str, Any] = getattr(session, "on_" + command.pop("do"))(**command)
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    return reply


def timed(run: Callable[[int], float], repeats: int) -> dict[str, float]:
    """Median and best of `repeats` calls that return their seconds, after two that do not count."""
    for turn in range(2):
        run(turn)
    seconds = [run(turn) for turn in range(repeats)]
    return {"median_s": statistics.median(seconds), "best_s": min(seconds)}
