"""Whether the engines agree: what each continues one prompt with, in fp32 and in bf16, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gguf_files import model_path
from worker_process import Program, WorkerFailed, WorkerProcess

TOKENS_PROMPT, TOKENS_COUNT, TOKENS_SEED = 40, 16, 11

Say = Callable[[str], None]


def greedy_tokens(
    programs: Sequence[Program], num_threads: int, folder: Path, say: Say, failures: list[str]
) -> dict[str, list[int]]:
    """What each engine answers to the same prompt in fp32 and in bf16, by "engine dtype"; one process at a time."""
    tokens: dict[str, list[int]] = {}
    for program in programs:
        if program.engine == "continuous":  # `greedy` is the other transformers engine's
            continue
        for dtype in ("float32", "bfloat16"):
            say(f"tokens of {program.engine} in {dtype}")
            try:
                path = model_path(program, folder, dtype)
                with WorkerProcess(program, folder.parent) as worker:
                    worker.ask("load", path=str(path), dtype=dtype, num_threads=num_threads)
                    reply = worker.ask("greedy", num_prompt=TOKENS_PROMPT, num_tokens=TOKENS_COUNT, seed=TOKENS_SEED)
                tokens[f"{program.engine} {dtype}"] = reply["tokens"]
            except WorkerFailed as error:
                failures.append(f"{program.engine} {dtype} tokens: {error}")
    return tokens


def compare_tokens(tokens: Mapping[str, Sequence[int]]) -> tuple[list[str], bool]:
    """Sentences on how far each engine agrees with the reference, and whether Baton's fp32 agrees wholly.

    The reference is transformers' fp32; without it, there is nothing to compare and nothing is wrong.
    """
    reference = tokens.get("transformers float32")
    if reference is None:
        return ["greedy tokens were not compared: transformers is missing"], True
    sentences, is_right = [], True
    for name, own in tokens.items():
        if name == "transformers float32":
            continue
        same = next((i for i, (a, b) in enumerate(zip(own, reference, strict=False)) if a != b), len(reference))
        sentences.append(f"greedy tokens of {name}: the first {same} of {len(reference)} equal transformers float32")
        if name == "baton float32":
            is_right = same == len(reference)
    return sentences, is_right
