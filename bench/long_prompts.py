"""What a long prompt takes of an engine's thread beside computing: each turn between two steps, without a model.

python bench/long_prompts.py
python bench/long_prompts.py --tokens 32768

A prompt lands that another worker has computed; another one evicts it to the host tier, and it is promoted from there. Blocks have
64 KiB, so a bite has 512 of them. Figures are CPU time of the thread, the least of some prompts; what takes longest is what all other
sequences wait for.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable

from machine_facts import machine_facts

from workers.engine.engine import Engine
from workers.engine.fake_runner import FakeRunner
from workers.engine.messages import StepResult
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_tiers.tiers import KvTiers
from workers.request import HandoffReport, Request, SamplingParams
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled
from workers.scheduler.scheduler import Limits
from workers.scheduler.sequence import Kind

VOCABULARY = 1_000_000
NUM_PROMPTS = 3


class NoModel(FakeRunner):
    """Draws the same token for everybody and reads no block."""

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        return [Sampled(p.sequence_id, 5 if p.sample is not None else None) for p in (*batch.prefill, *batch.decode)]


class NoText:
    """A Detokenizer."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def engine_for(num_tokens: int, with_host_tier: bool) -> Engine:
    """With blocks for one such prompt and a little more."""
    num_blocks = num_tokens // BLOCK_SIZE + 64
    memory = KvMemory(KvLayout(num_blocks, 1, 1, BLOCK_SIZE, 64, "float64", 8))
    return Engine(
        NoModel(memory, VOCABULARY),
        Limits(8, 8192, 8, 0),
        make_detokenizer=lambda request: NoText(),
        eos_token_ids=(),
        max_model_len=2 * num_tokens,
        tiers=KvTiers(memory, 3 * num_blocks // 2) if with_host_tier else None,
    )


def prompt(number: int, num_tokens: int, max_tokens: int) -> Request:
    tokens = tuple(range(number, number + num_tokens))
    return Request(f"r{number}", tokens, SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True))


def landings(num_tokens: int) -> dict[str, float]:
    """Milliseconds of each turn."""
    found: dict[str, list[float]] = {}

    def turn(name: str, work: Callable[[], object]) -> None:
        found.setdefault(name, []).append(cpu_ms(work))

    engine, report = engine_for(num_tokens, False), HandoffReport("prefill-0", "decode-0", "shm")
    for number in range(1, NUM_PROMPTS + 1):
        request = prompt(number, num_tokens, 64)
        turn("arrives", lambda r=request, n=number: engine.add(n, r, Kind.TARGET))  # type: ignore[misc]
        turn("is admitted, and evicts another", engine.step)
        turn("lands", lambda n=number: engine.incoming.landed(n, Sampled(n, 5), 0, report))  # type: ignore[misc]
        turn("the step after", engine.step)
        turn("ends", lambda n=number: engine.cancel(n))  # type: ignore[misc]
    return {name: min(values) for name, values in found.items()}


def tier_turns(num_tokens: int) -> dict[str, float]:
    """The longest turn of a prompt that evicts another to the host tier, and of one that is promoted from there."""
    engine = engine_for(num_tokens, True)
    longest = {}
    for number, (name, salt) in enumerate((("", 1), ("evicts another to the host tier", 2), ("is promoted", 1))):
        request = prompt(salt, num_tokens, 1)
        turns = [cpu_ms(lambda r=request, n=number: engine.add(n, r))]  # type: ignore[misc]
        for _ in itertools.count():
            results: list[StepResult] = []
            turns.append(cpu_ms(lambda found=results: found.append(engine.step())))  # type: ignore[misc]
            if any(output.finish_reason is not None for _, output in results[0].outputs):
                break
        if name:
            longest[f"{name}: the longest of {len(turns)} turns"] = max(turns)
    return longest


def cpu_ms(work: Callable[[], object]) -> float:
    start_s = time.thread_time()
    work()
    return (time.thread_time() - start_s) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=(128 << 10) - BLOCK_SIZE)
    args = parser.parse_args()
    print(machine_facts(), file=sys.stderr)
    print(f"| a prompt of {args.tokens} tokens | ms |\n|---|---:|")
    for name, ms in (landings(args.tokens) | tier_turns(args.tokens)).items():
        print(f"| {name} | {ms:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
