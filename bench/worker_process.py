"""The parent's side of a measured engine: starts its process, asks it, ends it. What is asked is in json_worker.py."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
START_TIMEOUT_S, REPLY_TIMEOUT_S = 120.0, 900.0


class WorkerFailed(Exception):
    """A worker process did not start, died, was silent, or answered with an error."""


@dataclass(frozen=True)
class Program:
    """How an engine's worker is started: interpreter, script beside this file, arguments."""

    engine: str
    python: str
    script: str
    arguments: tuple[str, ...] = ()
    install: str = ""
    """What to type where the engine is missing."""


class WorkerProcess:
    """A started worker; a context manager that ends it. Raises WorkerFailed, with the hint to install when that is the cause."""

    def __init__(self, program: Program, log_folder: Path) -> None:
        self._program = program
        self._log_path = log_folder / f"{program.engine}.log"
        # this checkout is measured, whatever is installed
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with self._log_path.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    [program.python, str(HERE / program.script), *program.arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            except OSError as error:
                raise WorkerFailed(f"cannot run {program.python}: {error}") from error
        self.version: str = self._reply(START_TIMEOUT_S)["version"]

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        stdin = self._process.stdin
        assert stdin is not None
        if stdin.closed:
            raise WorkerFailed("it has ended before")
        try:
            stdin.write(json.dumps({"do": do, **fields}) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise WorkerFailed(self._last_words()) from error
        return self._reply(REPLY_TIMEOUT_S)

    def stop(self) -> None:
        """Ends the process; safe to call twice."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], timeout_s)
        line = stdout.readline() if readable else ""
        if not line:
            self.stop()
            raise WorkerFailed(self._last_words() if readable else f"no answer within {timeout_s:.0f} s")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply

    def _last_words(self) -> str:
        lines = [line for line in self._log_path.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {self._process.returncode}"
        if "ModuleNotFoundError" in last:
            return f"not installed ({last}); to install: {self._program.install}"
        return last
