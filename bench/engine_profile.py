"""Says where the time of Baton's decode steps goes: parts of the step on the clock, and kernels by kind as `perf` samples them.

python bench/engine_profile.py --models dense --batches 1 8 32 --cache bench/results/cache

The prompts are not computed, so that everything which is sampled is a decode step. Without `perf` (Debian: linux-perf) only
the clock's table is printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this checkout is measured, whatever is installed

from baton_worker import BatonEngine, known_settings  # noqa: E402
from engine_report import number, table  # noqa: E402
from json_worker import random_prompt  # noqa: E402
from model_shapes import SHAPES  # noqa: E402
from profile_samples import Sample, shares, stepping_and_helping  # noqa: E402
from random_checkpoints import random_checkpoint  # noqa: E402
from workloads import DECODE_PROMPT, MAX_LEN, SHORT_POOL_TOKENS  # noqa: E402

from workers.model.native.library import Library  # noqa: E402
from workers.runner import Runner  # noqa: E402
from workers.scheduler.scheduler import Scheduler  # noqa: E402
from workers.text.tokenizer import IncrementalDetokenizer  # noqa: E402

PERF_HZ = 1000
MAX_STEPS = 500
"""A sequence has room for so many more tokens."""


class Spans:
    """Seconds spent in named parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner_s = [0.0]

    def clear(self) -> None:
        self.seconds.clear()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with its time noted under `name`."""

        def run(*positional: Any, **named: Any) -> Any:
            self._inner_s.append(0.0)
            started = time.perf_counter()
            try:
                return call(*positional, **named)
            finally:
                spent_s = time.perf_counter() - started
                self.seconds[name] += spent_s - self._inner_s.pop()
                self._inner_s[-1] += spent_s

        return run


def watch_parts(spans: Spans, runner: Runner) -> None:
    """From now on the parts of a step that have a method of their own are timed; for this process's lifetime."""
    methods: tuple[tuple[Any, str, str], ...] = (
        (Library, "forward", "layers, C++"),
        (Library, "head", "output projection, C++"),
        (Scheduler, "schedule", "scheduling"),
        (IncrementalDetokenizer, "push", "detokenizing"),
    )
    for owner, method, name in methods:
        setattr(owner, method, spans.timed(name, getattr(owner, method)))
    runner.execute = spans.timed("runner, Python", runner.execute)  # type: ignore[method-assign]


@contextmanager
def sampled(folder: Path) -> Iterator[list[Sample]]:
    """Samples of this process's threads while the block runs; filled when it ends, empty without perf."""
    samples: list[Sample] = []
    perf = shutil.which("perf")
    if perf is None:
        yield samples
        return
    data = folder / "perf.data"
    commands, acknowledgements = os.pipe(), os.pipe()
    control = f"--control=fd:{commands[0]},{acknowledgements[1]}"
    record = [perf, "record", "-q", "-F", str(PERF_HZ), "--call-graph", "dwarf,4096", "-o", str(data)]
    process = subprocess.Popen(
        [*record, "--delay=-1", control, "-p", str(os.getpid())],
        pass_fds=(commands[0], acknowledgements[1]),
        stderr=subprocess.DEVNULL,
    )
    os.close(acknowledgements[1])
    os.write(commands[1], b"enable\n")
    os.read(acknowledgements[0], 16)  # from here on it samples; or it has ended
    try:
        yield samples
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        for pipe in (*commands, acknowledgements[0]):
            os.close(pipe)
        script = [perf, "script", "--no-inline", "-i", str(data), "-F", "tid,ip,sym"]
        text = subprocess.run(script, capture_output=True, text=True, errors="replace", check=False).stdout
        samples += Sample.parse(text)


def profile(engine: BatonEngine, spans: Spans, batch: int, context: int, seconds: float, folder: Path) -> Iterator[str]:
    """Two tables for one batch size."""
    prompts = [random_prompt(context, engine.vocab_size, place) for place in range(batch)]
    with engine.decoding(prompts, MAX_STEPS, is_filled=True) as step:
        step()
        step = spans.timed("the engine's rest, Python", step)
        with sampled(folder) as samples:
            spans.clear()
            started = time.perf_counter()
            num_steps = 0
            while time.perf_counter() - started < seconds and num_steps < MAX_STEPS - 1:
                step()
                num_steps += 1
            total_s = time.perf_counter() - started
    rows = [
        [name, number(1e3 * spent_s / num_steps, 3), number(spent_s / total_s, 3)]
        for name, spent_s in spans.seconds.most_common()
    ]
    yield f"batch {batch} at {context}: {num_steps} steps of {1e3 * total_s / num_steps:.2f} ms"
    yield ""
    yield from table(["part of a step", "ms", "share"], iter(rows))
    if not samples:
        return
    stepping, helping = stepping_and_helping(samples, os.getpid())
    kinds = shares(stepping)
    others = shares(helping)
    yield ""
    yield from table(
        ["what the threads do", "stepping thread", "its helpers"],
        (
            [kind, number(kinds.get(kind), 3), number(others.get(kind), 3)]
            for kind in sorted({**kinds, **others}, key=lambda kind: -(kinds.get(kind, 0) + others.get(kind, 0)))
        ),
    )
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=["dense"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=DECODE_PROMPT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps, for each batch size")
    parser.add_argument("--cache", type=Path, required=True, help="keeps checkpoints here, as that of bench/engine.py")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    spans = Spans()
    settings = known_settings({"instruction_set": os.environ.get("BATON_ISA", "")})
    for name in args.models:
        folder = random_checkpoint(SHAPES[name], args.cache, max_len=MAX_LEN)
        room = max(SHORT_POOL_TOKENS, max(args.batches) * (args.context + 768))
        engine = BatonEngine(str(folder), "bfloat16", args.threads, room, settings)
        watch_parts(spans, engine.runner)
        print(f"### {name}, {args.threads} threads; {engine.describe()}\n")
        with tempfile.TemporaryDirectory(prefix="baton-profile-") as scratch:
            for batch in args.batches:
                print("\n".join(profile(engine, spans, batch, args.context, args.seconds, Path(scratch))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
