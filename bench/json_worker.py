"""The child's side of a measured engine: commands come as JSON lines, results go back as JSON lines; standard library only.

A worker process serves one engine, so that memory figures belong to it alone. Everything the engine prints goes to
standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class MeasuredEngine(Protocol):
    """What each engine can be asked. All token choices are greedy and ignore the end token."""

    @property
    def vocab_size(self) -> int: ...

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The tokens that follow `prompt`."""
        ...

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from the prompt to its first token."""
        ...

    def decode(self, prompts: list[list[int]], num_steps: int, is_filled: bool) -> dict[str, Any]:
        """{"step_s": seconds of each of about `num_steps` steps in which every prompt gets one token, ...}

        With `is_filled` the prompts' keys and values are any: they are put into the cache, not computed.
        """
        ...

    def describe(self) -> str:
        """What computes: kernels, instruction set."""
        ...


LoadEngine = Callable[[str, str, int], MeasuredEngine]
"""load(path, dtype, num_threads)."""


def random_prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids without special tokens; every engine gets the same ones for the same seed."""
    return random.Random(seed).choices(range(300, vocab_size), k=num_tokens)


def memory_bytes(field: str) -> int:
    """A field of this process's memory: VmRSS now, VmHWM the highest so far, RssAnon now without mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def serve(version: str, load: LoadEngine) -> None:
    """Answers commands from standard input until it ends. An error is answered, not raised."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = _Session(load)
    print(json.dumps({"version": version}), file=replies)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(session, "on_" + command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies)


class _Session:
    """One engine and the commands about it."""

    def __init__(self, load: LoadEngine) -> None:
        self._load = load
        self._engine: Any = None

    def on_load(self, path: str, dtype: str, num_threads: int) -> dict[str, Any]:
        """Loads a model. `peak_growth_bytes` is the highest RSS during the load above the RSS before it.

        RSS counts the pages of mapped files; `private_growth_bytes` is what the load left without them.
        """
        before, private_before = memory_bytes("VmRSS"), memory_bytes("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        started = time.perf_counter()
        self._engine = self._load(path, dtype, num_threads)
        return {
            "load_s": time.perf_counter() - started,
            "peak_growth_bytes": memory_bytes("VmHWM") - before,
            "private_growth_bytes": memory_bytes("RssAnon") - private_before,
        }

    def on_greedy(self, num_prompt: int, num_tokens: int, seed: int) -> dict[str, Any]:
        return {"tokens": self._engine.greedy(self._prompt(num_prompt, seed), num_tokens)}

    def on_prefill(self, num_prompt: int, seed: int) -> dict[str, Any]:
        return {"tokens_per_s": num_prompt / self._engine.prefill(self._prompt(num_prompt, seed))}

    def on_decode(
        self, batch: int, num_prompt: int, num_steps: int, seed: int, is_filled: bool = False
    ) -> dict[str, Any]:
        """The median step gives the speed: a neighbour that takes a core for a moment does not count."""
        prompts = [self._prompt(num_prompt, seed * 1000 + place) for place in range(batch)]
        result = self._engine.decode(prompts, num_steps, is_filled)
        steps = sorted(result.pop("step_s"))
        return {"tokens_per_s": batch / steps[len(steps) // 2], **result}

    def on_describe(self) -> dict[str, Any]:
        return {"text": self._engine.describe()}

    def on_memory(self) -> dict[str, Any]:
        return {"peak_bytes": memory_bytes("VmHWM")}

    def _prompt(self, num_tokens: int, seed: int) -> list[int]:
        return random_prompt(num_tokens, self._engine.vocab_size, seed)
