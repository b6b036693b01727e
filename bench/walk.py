"""Traces one streamed request through a running cluster and lists the files whose code ran, by process.

python bench/walk.py [--files]

Starts `baton serve` with one prefill and one decode worker and the shipped model, sends requests until all is warm, then one chat whose
prompt is computed by the prefill worker and handed over. Counts the files of cluster/, router/ and workers/ of which a function was
called in the router's and in both workers' processes meanwhile; beside it what idle processes run in the same time, which is not the
request's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
_START_S = 180.0
_SETTLE_S = 1.0
_RECORD_S = 2.0
_HANDED_OVER = "workers/handoff/service.py"
"""Runs where a prompt's KV is sent to another worker."""
_PROMPT = "Who are you? " * 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="also list the files")
    parser.add_argument("--set", action="append", default=[], help="further settings for baton serve")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-walk-") as folder, serving(Path(folder), options.set) as url:
        for _ in range(3):
            chat(url, f"Warm up. {_PROMPT}")
        time.sleep(_SETTLE_S)
        idle = recorded(Path(folder), lambda: time.sleep(_RECORD_S))
        walked = recorded(Path(folder), lambda: chat(url, f"Now. {_PROMPT}"))
    if not any(_HANDED_OVER in files for files in walked.values()):
        raise SystemExit("the decode worker computed the prompt itself: nothing was handed over")
    print("| process | files of the request | lines of them | files of an idle process |\n|---|--:|--:|--:|")
    own = {process: files - idle.get(process, set()) for process, files in walked.items()}
    everything = set[str]().union(*walked.values())
    for process, files in sorted(walked.items()):
        print(f"| {process} | {len(files)} | {lines(files)} | {len(idle.get(process, set()))} |")
    print(f"| all | {len(everything)} | {lines(everything)} | {len(set[str]().union(*idle.values()))} |")
    print(f"\nwithout what idle processes run: {len(set[str]().union(*own.values()))} files")
    if options.files:
        print(*sorted(everything), sep="\n")
    return 0


@contextmanager
def serving(folder: Path, settings: list[str]) -> Iterator[str]:
    """A cluster whose processes note what they run; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{HERE / 'walk_tracer'}{os.pathsep}{ROOT}", "BATON_WALK": str(folder)}
    baton = Path(sys.executable).with_name("baton")
    command = [str(baton), "serve", "--prefill", "1", "--decode", "1", "--no-dashboard", "--port", str(port)]
    command += [
        "--set",
        "worker.prefix_cache=false",
        "--set",
        "router.max_local_prefill_tokens=0",
        *(part for each in settings for part in ("--set", each)),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"baton serve did not start:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def chat(url: str, text: str) -> None:
    """Streams one answer to its end, of whichever model is served."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "stream": True}
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        events = [line for line in answer if line.startswith(b"data: ")]
    if events[-1].strip() != b"data: [DONE]":
        raise SystemExit(f"the answer did not end well: {events[-1]!r}")


def recorded(folder: Path, action: Callable[[], None]) -> dict[str, set[str]]:
    """The files that each process ran during `action`, below the root."""
    flag = folder / "recording"
    flag.touch()
    time.sleep(0.2)
    action()
    flag.unlink()
    time.sleep(0.5)
    found: dict[str, set[str]] = {}
    for report in folder.glob("*.txt"):
        command, *files = report.read_text().splitlines()
        report.unlink()
        relative = {str(Path(file).relative_to(ROOT)) for file in files}
        found[f"{command.split()[0]} {report.stem}"] = relative
    return found


def lines(files: set[str]) -> int:
    return sum(len((ROOT / file).read_text().splitlines()) for file in files)


if __name__ == "__main__":
    sys.exit(main())
