"""The whole CUDA path on the device at hand: its tokens are those of TorchRunner, its padding harms nobody.

On a machine without a GPU the device is the CPU, kernels run in Triton's interpreter, and decode runs its buckets without
recorded graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import hand_over, make_engine, make_request, run_to_end, tokens_of

import tests.unit.interpreted_products  # noqa: F401
from tests.unit.model_configs import (
    GREEDY,
    Oracle,
    decode,
    load,
    logits,
    moe_with_shared_experts,
    prefill,
    random_tokens,
    small_dense,
)
from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.model.cuda.decode_graphs import BUCKETS, bucket_for
from workers.model.cuda.runner import CudaRunner
from workers.model.loading import load_runner
from workers.request import FinishReason, Output
from workers.runner import Batch, SampleSpec

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
MAX_LEN = 192


def tiny_dense(folder: Path, **changes: Any) -> Oracle:
    fields: dict[str, Any] = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=MAX_LEN,
    )  # fmt: skip
    return small_dense(folder, **{**fields, **changes})


def tiny_moe(folder: Path) -> Oracle:
    return moe_with_shared_experts(
        folder, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=MAX_LEN, moe_num_experts=4, moe_k=2,
        moe_num_shared_experts=1, moe_intermediate_size=16, moe_layer_start_index=1, moe_layer_end_index=1,
    )  # fmt: skip


def load_cuda(folder: Path, **changes: Any) -> CudaRunner:
    fields: dict[str, Any] = dict(device="cuda", max_model_len=MAX_LEN, kv_memory_bytes=4 << 20, max_num_seqs=4)
    return CudaRunner.load_on(WorkerConfig(model=str(folder), **{**fields, **changes}), DEVICE)


def greedy(runner: Any, prompt: list[int], count: int, chunk: int, table: list[int]) -> list[int]:
    """The prompt in chunks, then one token a step."""
    spec = SampleSpec(GREEDY, 0, 0, prompt, ())
    for start in range(0, len(prompt), chunk):
        piece = prefill(prompt[: start + chunk], start, table, sample=spec)
        tokens = [runner.execute(Batch(prefill=(piece,)))[0].token_id]
    while len(tokens) < count:
        piece = decode(tokens[-1], len(prompt) + len(tokens) - 1, table, sample=spec)
        tokens.append(runner.execute(Batch(decode=(piece,)))[0].token_id)
    return tokens


@pytest.mark.parametrize("maker", [tiny_dense, tiny_moe])
def test_greedy_tokens_after_a_chunked_prompt_and_over_the_edge_of_a_block_are_those_of_the_cpu(
    maker: Callable[[Path], Oracle], tmp_path: Path
) -> None:
    maker(tmp_path)
    prompt = random_tokens(125, vocab_size=64)
    expected = greedy(load(tmp_path, max_model_len=MAX_LEN), prompt, 8, 80, [3, 1, 2])
    assert greedy(load_cuda(tmp_path, deterministic=False), prompt, 8, 80, [3, 1, 2]) == expected


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("checkpoint")).folder


def test_mixed_batches_have_the_logits_of_the_cpu_in_both_modes(moe: Path) -> None:
    prompt, other = random_tokens(10, vocab_size=64), random_tokens(3, seed=1, vocab_size=64)

    def run(runner: Any) -> torch.Tensor:
        first = logits(runner, prefill(prompt, table=[1]))
        tokens = [decode(9, 10, [1]), decode(8, 0, [4]), decode(7, 0, [5])]
        return torch.cat([first, logits(runner, prefill(other, table=[2]), decode=tokens)]).cpu()

    expected = run(load(moe, max_model_len=MAX_LEN))
    for deterministic in (True, False):
        torch.testing.assert_close(run(load_cuda(moe, deterministic=deterministic)), expected, atol=1e-4, rtol=1e-3)


def test_a_padded_step_gives_the_same_bits_and_touches_no_other_block(moe: Path) -> None:
    runner = load_cuda(moe)
    assert runner.warm_up() == ()
    tokens = [decode(9, 0, [1]), decode(8, 0, [2]), decode(7, 0, [3])]
    together = logits(runner, decode=tokens).clone()
    values = runner._pool.values
    assert not values[[0, *range(4, len(values) - 1)]].any() and values[-1].any()
    assert torch.equal(logits(runner, decode=tokens[:1]), together[:1])
    five = [decode(9, 0, [block]) for block in range(5)]  # more than max_num_seqs: two passes
    assert torch.equal(logits(runner, decode=five), together[:1].expand(5, -1))


def test_a_prompt_computed_on_one_device_is_continued_on_another_with_the_same_tokens(moe: Path) -> None:
    request = make_request(random_tokens(9, vocab_size=64), max_tokens=6)
    alone = make_engine(load(moe, max_model_len=MAX_LEN), max_model_len=MAX_LEN)
    alone.add(1, request)
    runners = [load_cuda(moe, deterministic=False) for _ in range(2)]
    source, target = (make_engine(runner, max_model_len=MAX_LEN) for runner in runners)
    hand_over(runners[0], source, runners[1], target, request)
    assert tokens_of(run_to_end(target), 1) == tokens_of(run_to_end(alone), 1)


def test_overlapping_steps_give_the_outputs_of_steps_that_wait(moe: Path) -> None:
    """More sequences than one pass of decode takes, prompts that arrive meanwhile, and ends that nobody foresees."""
    runner = load_cuda(moe)
    requests = [
        make_request([9, 8, 7], max_tokens=6, stop_token_ids=tuple(range(0, 64, 2))),
        make_request(random_tokens(12, vocab_size=64), max_tokens=3, temperature=1.0, seed=5, logprobs=2),
        make_request([5, 6], max_tokens=4, temperature=0.8, top_p=0.9, seed=1),
        make_request([5, 6], max_tokens=2, prompt_logprobs=1),
        make_request([5, 6], max_tokens=2, repetition_penalty=1.3),
        make_request([4], max_tokens=2, min_tokens=2),
    ]

    def run(overlap_steps: bool) -> list[list[Output]]:
        engine = make_engine(runner, max_model_len=MAX_LEN, max_batch_tokens=10, overlap_steps=overlap_steps)
        outputs: list[tuple[int, Output]] = []
        for index, request in enumerate(requests):
            engine.add(index, request)
            outputs += engine.step().outputs
        outputs += run_to_end(engine)
        assert engine.num_held_blocks == 0
        return [[o._replace(handoff=None) for i, o in outputs if i == index] for index in range(len(requests))]

    expected = run(overlap_steps=False)
    assert run(overlap_steps=True) == expected
    assert expected[0][-1].finish_reason is FinishReason.STOP


def test_masks_bind_what_is_drawn_as_on_the_cpu(moe: Path) -> None:
    """A grammar's masks and `allowed_token_ids` reach the draw the same way; greedy, at random, and beside a sequence without."""
    allowed = (3, 17, 40, 63)
    choices = [(0.0, allowed), (1.3, allowed), (1.3, ())]
    outputs = []
    ends: set[int] = set()
    for runner in (load(moe, max_model_len=MAX_LEN), load_cuda(moe)):
        engine = make_engine(runner, max_model_len=MAX_LEN)
        ends |= set(runner.eos_token_ids)
        for number, (temperature, tokens) in enumerate(choices):
            asked = make_request(
                range(20), max_tokens=12, temperature=temperature, seed=4, allowed_token_ids=tokens, ignore_eos=True
            )
            engine.add(number, asked)
        ended = run_to_end(engine)
        outputs.append([tokens_of(ended, number) for number in range(len(choices))])
    greedy_ones, drawn, free = outputs[0]
    assert outputs[0] == outputs[1]
    assert {*greedy_ones, *drawn} <= {*allowed, *ends} and len(set(drawn)) > 1 and not set(free) <= {*allowed, *ends}


def test_a_launched_step_takes_its_tokens_from_the_one_before_it_not_from_the_host(moe: Path) -> None:
    runner = load_cuda(moe)
    spec = SampleSpec(GREEDY, 0, 0, (9,), ())
    first = runner.launch(Batch(decode=tuple(replace(decode(9, 0, [b], sample=spec), sequence_id=b) for b in range(5))))
    late = tuple(replace(decode(0, 1, [b], sample=spec, is_late=True), sequence_id=b) for b in (3, 0, 4, 1, 2))
    second = runner.launch(Batch(decode=late), first)
    (token,) = {sampled.token_id for sampled in runner.finish(first)}
    (after,) = {sampled.token_id for sampled in runner.finish(second)}
    assert runner.execute(Batch(decode=(decode(token, 1, [2], sample=spec),)))[0].token_id == after
    assert runner.execute(Batch(decode=(decode(0, 1, [2], sample=spec),)))[0].token_id != after


def test_block_tables_that_are_too_short_raise(moe: Path) -> None:
    runner = load_cuda(moe)
    with pytest.raises(IndexError, match="need 2 blocks"):
        runner.hidden_states(Batch(decode=(decode(5, 64, [1]),)))
    with pytest.raises(IndexError, match="need 2 blocks"):
        runner.hidden_states(Batch(prefill=(prefill(range(65), table=[1]),)))
    with pytest.raises(IndexError, match="longest sequence"):
        runner.hidden_states(Batch(prefill=(prefill(range(MAX_LEN + 1)),)))
    with pytest.raises(IndexError, match="longest sequence"):
        runner.hidden_states(Batch(decode=(decode(5, MAX_LEN, [1, 2, 3, 4]),)))


def test_the_pool_has_the_size_asked_for_and_kv_is_not_exchanged_with_another_kind_of_device(moe: Path) -> None:
    runner = load_cuda(moe)
    layout = runner.kv_memory.layout
    assert layout.num_blocks == (4 << 20) // layout.block_bytes and len(runner._pool.values) == layout.num_blocks + 1
    if DEVICE.type == "cuda":
        assert runner.model_info.fingerprint != load(moe, max_model_len=MAX_LEN).model_info.fingerprint
    with pytest.raises(InvalidConfig, match="one sequence of 192 tokens needs"):
        load_cuda(moe, kv_memory_bytes=1 << 10)


def test_buckets_hold_every_number_of_rows() -> None:
    assert [bucket_for(rows) for rows in (1, 3, 16, 17, 33, 49, 256, 257, 400)] == [1, 4, 16, 32, 48, 64, 256, 320, 448]
    assert all(bucket_for(bucket) == bucket for bucket in BUCKETS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_machine_without_a_gpu_refuses_with_a_reason(moe: Path) -> None:
    with pytest.raises(InvalidConfig, match="needs a GPU"):
        load_runner(WorkerConfig(model=str(moe), device="cuda"))


@pytest.mark.parametrize("fields", [{"device": "gpu"}, {"device": "cuda:x"}, {"deterministic": False}])
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        WorkerConfig(model="x", **fields)
