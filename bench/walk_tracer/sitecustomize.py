"""Loaded by Python at its start where bench/walk.py set PYTHONPATH: notes the files of Baton whose functions run while asked to.

Every thread has the hook from its start, so a process must be born with it. While $BATON_WALK/recording exists, files are noted; when it
goes, they are written to $BATON_WALK/PID.txt behind the process's command line.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

_POLL_S = 0.02


class Recorder:
    def __init__(self, folder: Path, root: Path) -> None:
        self._folder = folder
        self._rooms = tuple(f"{root}/{room}/" for room in ("cluster", "router", "workers"))
        self._files: set[str] = set()
        self._is_recording = False

    def hook(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._is_recording and event == "call":
            self._files.add(frame.f_code.co_filename)

    def watch(self) -> None:
        while True:
            time.sleep(_POLL_S)
            if (self._folder / "recording").exists():
                self._is_recording = True
            elif self._is_recording:
                self._is_recording = False
                self._write()

    def _write(self) -> None:
        files = sorted(file for file in self._files if file.startswith(self._rooms))
        self._files.clear()
        if not files:
            return
        command = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        partial = self._folder / f"{os.getpid()}.partial"
        partial.write_text("\n".join((command, *files)) + "\n")
        partial.rename(partial.with_suffix(".txt"))


def _start() -> None:
    folder = os.environ.get("BATON_WALK")
    if not folder:
        return
    recorder = Recorder(Path(folder), Path(__file__).resolve().parents[2])
    threading.setprofile(recorder.hook)
    sys.setprofile(recorder.hook)
    threading.Thread(target=recorder.watch, name="walk", daemon=True).start()


_start()
