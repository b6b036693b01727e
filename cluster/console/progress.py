"""Tells the operator what is being done: one line per step, with a spinner only where somebody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TextIO

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Progress:
    """Writes to stderr, so that stdout stays with the result. `quiet` writes nothing."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self.seconds: dict[str, float] = {}
        """How long each finished step took."""

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            with suppress(OSError, ValueError):
                self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
                self._stream.flush()

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Shows that `text` is being done, then that it is done and how long it took; failed when it raises."""
        began = time.monotonic()
        over = Event()
        spinner = Thread(target=self._spin, args=(text, over), daemon=True) if self._live else None
        if spinner:
            spinner.start()
        try:
            yield
        except BaseException:
            self._finish(spinner, over)
            self.say(f"  ✗ {text}")
            raise
        self._finish(spinner, over)
        self.seconds[text] = time.monotonic() - began
        self.say(f"  ✓ {text}  {self.seconds[text]:.1f} s")

    def _spin(self, text: str, over: Event) -> None:
        at = 0
        while not over.wait(0.1):
            with suppress(OSError, ValueError):  # a terminal that is gone
                self._stream.write(f"\r\x1b[K  {_FRAMES[at % len(_FRAMES)]} {text}")
                self._stream.flush()
            at += 1

    @staticmethod
    def _finish(spinner: Thread | None, over: Event) -> None:
        over.set()
        if spinner:
            spinner.join()
