"""What certificates and encryption add to a whole cluster: first token, time per token and KV GB/s, with and without in alternation.

Two clusters of a prefill and a decode worker each stand beside each other, one with TLS (the default) and one with tls.mode=off; each
round asks both the same, one after the other. Every prompt is computed by the prefill worker and travels over `tcp`.

    python bench/tls_cluster.py --rounds 8
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engine_report import number, table
from machine_facts import ForeignLoad, machine_facts

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = (
    "worker.transports=tcp",
    "worker.local_prefill_tokens=0",
    "router.max_local_prefill_tokens=0",
    "worker.kv_memory_bytes=400000000",
    "worker.prefix_cache=false",
)
LONG = 3000
"""Tokens of the prompt whose KV is timed."""
NUM_TOKENS = 200


class Cluster:
    """A `baton serve` that this program started; left, it is gone."""

    def __init__(self, model: str, mode: str) -> None:
        flags = [flag for setting in (*SETTINGS, f"tls.mode={mode}") for flag in ("--set", setting)]
        command = [sys.executable, "-m", "cluster.cli", "serve", "--model", model, "--port", "0", *flags]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, start_new_session=True
        )
        said = ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        found = re.search(r"(http://[^/\s]+)/v1", said)
        if found is None:
            raise SystemExit(f"baton serve did not start:\n{said}")
        self.url = found[1]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)

    def ask(self, prompt: list[int], max_tokens: int) -> dict[str, float]:
        """Seconds to the first token and for each further one; bytes and seconds of the prompt's KV."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "trace": True,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        begun_s = time.perf_counter()
        times: list[float] = []
        trace: dict[str, Any] = {}
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
                    trace = json.loads(line[6:]).get("baton") or trace
        choice = trace["choices"][0]
        if choice["transport"] != "tcp":
            raise SystemExit(f"the prompt's KV came over {choice['transport']}")
        per_token_s = (times[-1] - times[0]) / (max_tokens - 1) if max_tokens > 1 else 0.0
        kv = {"kv_bytes": choice["kv_bytes"], "transfer_s": choice["transfer_s"]}
        return {"ttft_s": times[0] - begun_s, "per_token_s": per_token_s, **kv}


def round_of(cluster: Cluster, turn: int, repeats: int) -> dict[str, float]:
    """Medians of short prompts, one answer of some length, and long prompts."""
    short = [cluster.ask([5 + turn % 1000, 6 + at, 7], 2) for at in range(4 * repeats)]
    answer = cluster.ask([9, 8, 7], NUM_TOKENS)
    long = [cluster.ask([5 + (turn + at + place) % 1000 for place in range(LONG)], 1) for at in range(repeats)]
    return {
        "first token, 3-token prompt, ms": statistics.median(each["ttft_s"] for each in short) * 1e3,
        f"first token, {LONG}-token prompt, ms": statistics.median(each["ttft_s"] for each in long) * 1e3,
        "time per token, ms": answer["per_token_s"] * 1e3,
        f"KV of {LONG} tokens, GB/s": max(each["kv_bytes"] / each["transfer_s"] for each in long) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / "models" / "ernie-4.5-tiny"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--repeats", type=int, default=4, help="long prompts of a round; short ones are four times as many"
    )
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    with ExitStack() as stack:
        clusters = {mode: stack.enter_context(Cluster(args.model, mode)) for mode in found}
        for cluster in clusters.values():
            round_of(cluster, 0, 1)
        load = ForeignLoad()
        for turn in range(args.rounds):
            for mode in ("on", "off") if turn % 2 else ("off", "on"):
                found[mode].append(round_of(clusters[mode], turn, args.repeats))
        share = load.share()
    machine = machine_facts()
    print(f"{machine['date']}, {machine['cpu']}, {machine['num_cores']} cores, {args.rounds} rounds, medians of rounds; "
          f"these clusters and other programs took {share:.0%} of the cores beside this one.\n")  # fmt: skip
    rows = []
    for name in found["on"][0]:
        without, with_tls = (statistics.median(each[name] for each in found[mode]) for mode in ("off", "on"))
        paired = statistics.median(on[name] / off[name] for on, off in zip(found["on"], found["off"], strict=True))
        rows.append([name, number(without), number(with_tls), f"{paired:.2f}"])
    print("\n".join(table(["", "without", "with", "with over without, median of pairs"], iter(rows))))


if __name__ == "__main__":
    main()
