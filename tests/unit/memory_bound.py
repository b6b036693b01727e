"""Run by test_host_limits.py in a process of its own: enters a control group, takes most of what that has, gives it back, and prints what its watch has seen."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from workers.machine.limits import available_bytes  # noqa: E402
from workers.machine.pressure import MemoryWatch  # noqa: E402

MIB = 1 << 20


def main(group: str) -> None:
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    turn = iter(range(10))
    watch = MemoryWatch("nothing is kept", 200 * MIB, clock=lambda: 10.0 * next(turn))
    seen = [watch.is_short]
    before = available_bytes()
    taken = bytearray(b"x") * (300 * MIB)
    seen.append(watch.is_short)
    del taken
    seen.append(watch.is_short)
    print(json.dumps([before // MIB, seen]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
