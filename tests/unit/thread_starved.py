"""Run by test_exhausted_threads.py in a process of its own, which may start no more threads after a while: prints what it answers then."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fake_backend import open_api  # noqa: E402

from router.api.offload import HUGE_BYTES  # noqa: E402
from router.config import ApiConfig  # noqa: E402
from workers.machine.threads import started_threads  # noqa: E402

BODIES = {"small": 10, "large": 9000, "huge": HUGE_BYTES + 1}
NOBODY = 65534


def main() -> None:
    with open_api(ApiConfig(offload_bytes=1000)) as api:

        def ask() -> dict[str, list[object]]:
            answers = {}
            for name, size in BODIES.items():
                answer = api.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2, "user": "x" * size})
                answers[name] = [answer.status_code, answer.headers.get("retry-after")]
            return answers

        api.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
        api.http.get("/docs")
        pool = started_threads(4, "started")
        if os.getuid() == 0:  # root may start what it likes
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
        try:
            threading.Thread(target=int).start()
        except RuntimeError:
            starved = ask()
            worked = list(pool.map(int, range(8)))
            resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
            print(json.dumps({"starved": starved, "worked": worked, "after": ask()}), flush=True)
            os._exit(0)
        print(json.dumps(None), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
