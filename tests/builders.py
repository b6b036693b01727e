"""Builds the small engines, requests and pools that tests talk about."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from byte_tokens import vocabulary

from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.engine.fake_runner import FakeRunner
from workers.engine.messages import StepResult
from workers.grammar.language import engine_name
from workers.grammar.vocabulary import GrammarVocabulary
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_tiers.tiers import KvTiers
from workers.limits import DEFAULT_LIMITS, RequestLimits
from workers.request import HandoffReport, Output, Request, SamplingParams
from workers.runner import BLOCK_SIZE, Runner
from workers.scheduler.scheduler import Limits
from workers.scheduler.sequence import Kind
from workers.status import ModelInfo

EOS = 2
REPORT = HandoffReport("p", "d", "shm", attempts=1)

_TESTS = Path(__file__).resolve().parent
IMPORT_PATHS = os.pathsep.join(str(folder) for folder in (_TESTS / "unit", _TESTS, _TESTS.parent))
"""PYTHONPATH of a process that imports what tests import."""


class PlainDetokenizer:
    """Writes token 17 as "<17>"."""

    def push(self, token_id: int) -> str:
        return f"<{token_id}>"

    def flush(self) -> str:
        return ""


def fake_layout(num_blocks: int = 16, num_layers: int = 2) -> KvLayout:
    """A pool for FakeRunner: each block holds at least 64 slots of 8 bytes."""
    return KvLayout(
        num_blocks, num_layers, num_kv_heads=1, block_size=BLOCK_SIZE, head_dim=2, dtype="float32", itemsize=4
    )


def fake_runner(num_blocks: int = 16) -> FakeRunner:
    return FakeRunner(KvMemory(fake_layout(num_blocks)))


def make_engine(
    runner: Runner | None = None,
    *,
    max_num_seqs: int = 8,
    max_batch_tokens: int = 128,
    max_queue: int = 64,
    local_prefill_tokens: int = 0,
    max_decode_pause_s: float = math.inf,
    max_model_len: int = 1024,
    prefix_cache: bool = True,
    overlap_steps: bool = True,
    tiers: KvTiers | None = None,
    clock: Callable[[], float] = time.monotonic,
    vocabulary: GrammarVocabulary | None = None,
    request_limits: RequestLimits = DEFAULT_LIMITS,
) -> Engine:
    return Engine(
        runner or fake_runner(),
        Limits(max_num_seqs, max_batch_tokens, max_queue, local_prefill_tokens, max_decode_pause_s=max_decode_pause_s),
        make_detokenizer=lambda request: PlainDetokenizer(),
        eos_token_ids=(EOS,),
        max_model_len=max_model_len,
        prefix_cache=prefix_cache,
        overlap_steps=overlap_steps,
        tiers=tiers,
        clock=clock,
        vocabulary=vocabulary,
        request_limits=request_limits,
    )


def make_request(
    prompt: Iterable[int],
    max_tokens: int = 8,
    *,
    request_id: str = "r",
    temperature: float = 0.0,
    seed: int = 0,
    choice_index: int = 0,
    replay: Iterable[int] = (),
    **params: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, **params),  # type: ignore[arg-type]
        choice_index=choice_index,
        replay_token_ids=tuple(replay),
    )


def run_to_end(engine: Engine, max_steps: int = 5000) -> list[tuple[int, Output]]:
    """Steps until nothing is left; all outputs in order."""
    outputs: list[tuple[int, Output]] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        outputs += engine.step().outputs
        if engine.made_no_progress:
            engine.rest(timeout_s=1.0)
    raise AssertionError(f"the engine still has work after {max_steps} steps")


def step_until(engine: Engine, wanted: str, max_steps: int = 5000) -> StepResult:
    """Steps until a result has something in the field `wanted`."""
    for _ in range(max_steps):
        result = engine.step()
        if getattr(result, wanted):
            return result
    raise AssertionError(f"no {wanted} after {max_steps} steps")


def tokens_of(outputs: list[tuple[int, Output]], sequence_id: int) -> list[int]:
    return [token for owner, output in outputs if owner == sequence_id for token in output.token_ids]


def generate_alone(request: Request, num_blocks: int = 16, **limits: int) -> list[int]:
    """The tokens of a request that has an engine for itself: the golden run."""
    return [token for output in run_alone(request, num_blocks, **limits) for token in output.token_ids]


def run_alone(request: Request, num_blocks: int = 16, **limits: int) -> list[Output]:
    """All that such an engine says."""
    known = vocabulary() if request.params.grammar else None
    engine = make_engine(fake_runner(num_blocks), prefix_cache=False, vocabulary=known, **limits)  # type: ignore[arg-type]
    engine.add(0, request)
    return [output for _, output in run_to_end(engine)]


def hand_over(source_runner: Runner, source: Engine, target_runner: Runner, target: Engine, request: Request) -> None:
    """Moves one prompt's blocks between two engines by hand."""
    target.add(1, request, Kind.TARGET)
    wanted = step_until(target, "transfers").transfers[0]
    source.add(7, request, Kind.SOURCE)
    filled: dict[int, int] = {}
    while True:
        result = source.step()
        for report in result.filled:
            filled.update({i: report.blocks[i] for i in range(report.num_filled)})
        if result.prefilled:
            break
    for index in range(wanted.first_block, len(wanted.blocks)):
        view = target_runner.kv_memory.block(wanted.blocks[index], 0, 2)
        view[:] = source_runner.kv_memory.block(filled[index], 0, 2)
    target.incoming.landed(1, result.prefilled[0].sampled, 0, REPORT)
    source.cancel(7)


class FakeModel:
    """A LoadedModel around FakeRunner; every instance is the same model."""

    def __init__(self, config: WorkerConfig, num_blocks: int = 64) -> None:
        self.runner: Runner = fake_runner(num_blocks)
        self.info = ModelInfo(
            "fake", "fake-1", self.runner.vocab_size, config.max_model_len or 4096, BLOCK_SIZE, engine_name()
        )
        self.eos_token_ids = (EOS,)
        self.vocabulary: GrammarVocabulary | None = vocabulary()

    def make_detokenizer(self, request: Request) -> PlainDetokenizer:
        return PlainDetokenizer()
