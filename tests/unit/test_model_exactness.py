"""A sequence gets the same bits whatever runs beside it and however its prompt is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model_configs import (
    SHIPPED,
    Oracle,
    decode,
    dense_like_0_3b,
    load,
    logits,
    moe_with_shared_experts,
    moe_without_shared_experts,
    prefill,
    random_tokens,
    small_dense,
)
from workers.model.cpu.runner import TorchRunner
from workers.runner import SequenceSlice

MAKERS: dict[str, Callable[..., Oracle]] = {
    "dense": dense_like_0_3b,
    "small dense": small_dense,
    "moe": moe_with_shared_experts,
    "moe without shared experts": moe_without_shared_experts,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=[*MAKERS, "shipped"])
def runner(
    request: pytest.FixtureRequest, dtype: str, native: bool, tmp_path_factory: pytest.TempPathFactory
) -> TorchRunner:
    if request.param == "shipped":
        return load(SHIPPED, dtype, native=native)
    changes = {"num_hidden_layers": 1} if request.param == "dense" else {}
    return load(MAKERS[request.param](tmp_path_factory.mktemp("checkpoint"), **changes).folder, dtype, native=native)


def kv_bytes(runner: TorchRunner, table: Sequence[int]) -> bytes:
    layout = runner.kv_memory.layout
    return b"".join(runner.kv_memory.block(block, 0, layout.num_layers).tobytes() for block in table)


def fill_with_noise(runner: TorchRunner) -> None:
    """Gives every block keys and values that a model could have written."""
    generator = torch.Generator().manual_seed(3)
    dtype: torch.dtype = getattr(torch, runner.kv_memory.layout.dtype)
    values = torch.from_numpy(runner.kv_memory.bytes).view(dtype)
    values.copy_(torch.randn(values.shape, generator=generator))


def in_chunks(tokens: Sequence[int], size: int, table: Sequence[int], start: int = 0) -> list[SequenceSlice]:
    return [prefill(tokens[: i + size], i, table) for i in range(start, len(tokens), size)]


@pytest.mark.parametrize("size", [1, 7, 64, 100, 200])
def test_a_prompt_has_the_same_bits_in_chunks_of_any_size(runner: TorchRunner, size: int) -> None:
    tokens = random_tokens(131 if size == 1 else 230)
    whole = logits(runner, prefill(tokens, table=range(4)))
    chunks = [logits(runner, piece) for piece in in_chunks(tokens, size, range(4, 8))]
    assert torch.equal(torch.cat(chunks), whole)
    assert kv_bytes(runner, range(-(-len(tokens) // 64))) == kv_bytes(runner, range(4, 4 + -(-len(tokens) // 64)))


def test_a_prompt_has_the_same_bits_behind_a_reused_prefix(runner: TorchRunner) -> None:
    first, second = random_tokens(200), random_tokens(128) + random_tokens(70, seed=5)
    whole = logits(runner, prefill(second, table=range(4)))
    logits(runner, prefill(first, table=range(4, 8)))
    assert torch.equal(logits(runner, prefill(second, 128, table=[4, 5, 12, 13])), whole[128:])


def test_a_sequence_has_the_same_bits_alone_and_in_a_mixed_batch(runner: TorchRunner) -> None:
    prompts = [random_tokens(length, seed) for seed, length in enumerate([1, 63, 64, 65, 200])]
    tables = [range(5 * i, 5 * i + 5) for i in range(5)]
    for prompt, table in zip(prompts, tables, strict=True):
        logits(runner, prefill(prompt, table=table))
    tokens = [decode(9 + i, len(prompt), tables[i]) for i, prompt in enumerate(prompts)]
    pieces = [prefill(random_tokens(90), 30, range(40, 44)), prefill(random_tokens(3), 0, range(44, 48))]
    alone = [logits(runner, piece) for piece in pieces] + [logits(runner, decode=[token]) for token in tokens]
    assert torch.equal(logits(runner, *pieces, decode=tokens), torch.cat(alone))
    assert torch.equal(logits(runner, *pieces, decode=tokens[::-1])[-1:], alone[2])


def test_long_sequences_have_the_same_bits_alone_and_together(runner: TorchRunner) -> None:
    fill_with_noise(runner)
    tokens = [decode(7 + i, position, range(16 * i, 16 * i + 16)) for i, position in enumerate((1000, 30, 700, 1023))]
    together = logits(runner, decode=tokens)
    assert torch.equal(together, torch.cat([logits(runner, decode=[token]) for token in tokens]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_of_several_spans_has_the_same_bits_in_chunks(dtype: str, native: bool) -> None:
    runner, tokens = load(SHIPPED, dtype, num_blocks=80, max_model_len=2560, native=native), random_tokens(2200)
    whole = logits(runner, prefill(tokens, table=range(35)))
    chunks = [logits(runner, piece) for piece in in_chunks(tokens, 900, range(40, 75))]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize(("maker", "dtype"), [(dense_like_0_3b, "float32"), (moe_with_shared_experts, "bfloat16")])
def test_the_number_of_threads_does_not_change_the_bits(
    maker: Callable[..., Oracle], dtype: str, native: bool, tmp_path: Path
) -> None:
    folder = maker(tmp_path, num_hidden_layers=2).folder
    tokens = random_tokens(150)

    def run(num_threads: int) -> Tensor:
        runner = load(folder, dtype, native=native, num_threads=num_threads)
        torch.set_num_threads(num_threads)
        return torch.cat([logits(runner, prefill(tokens)), logits(runner, decode=[decode(8, 150)])])

    one, two = run(1), run(2)
    torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_what_a_block_held_before_does_not_matter(runner: TorchRunner) -> None:
    tokens, table = random_tokens(100), range(48, 51)

    def run() -> Tensor:
        rows = [logits(runner, piece) for piece in in_chunks(tokens, 70, table)]
        return torch.cat([*rows, *(logits(runner, decode=[decode(7, 100 + i, table)]) for i in range(40))])

    clean = run()
    for block in table:
        runner.kv_memory.block(block, 0, runner.kv_memory.layout.num_layers)[:] = 0xFF  # NaN in both dtypes
    assert torch.equal(run(), clean)


@pytest.fixture(scope="module")
def references(
    native: bool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TorchRunner, list[tuple[list[int], int, Tensor]]]:
    """A runner, and sequences (tokens, prompt length) with the logits each row has when it runs alone."""
    folder = moe_with_shared_experts(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=3).folder
    runner = load(folder, num_blocks=32, native=native)
    found = []
    for seed, num_prompt in enumerate((3, 60, 64, 130, 150)):
        tokens = random_tokens(num_prompt + 6, seed)
        rows = [logits(runner, prefill(tokens[:num_prompt]))]
        rows += [logits(runner, decode=[decode(tokens[i], i)]) for i in range(num_prompt, len(tokens))]
        found.append((tokens, num_prompt, torch.cat(rows)))
    return runner, found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_every_row_the_bits_it_has_alone(
    references: tuple[TorchRunner, list[tuple[list[int], int, Tensor]]], data: st.DataObject
) -> None:
    runner, sequences = references
    chosen = data.draw(st.lists(st.sampled_from(range(len(sequences))), min_size=1, max_size=6))
    blocks = data.draw(st.permutations(range(4 * 6)))
    tables = [blocks[4 * i : 4 * i + 4] for i in range(len(chosen))]
    done = [0] * len(chosen)
    while running := [i for i, which in enumerate(chosen) if done[i] < len(sequences[which][0])]:
        prompts, tokens, expected = [], [], {}
        for i in data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True)):
            ids, num_prompt, rows = sequences[chosen[i]]
            if done[i] < num_prompt:
                end = min(num_prompt, done[i] + data.draw(st.integers(1, 150)))
                prompts.append(prefill(ids[:end], done[i], tables[i]))
            else:
                end = done[i] + 1
                tokens.append(decode(ids[done[i]], done[i], tables[i]))
            expected[tables[i][0]] = rows[done[i] : end]
            done[i] = end
        order = [expected[piece.block_table[0]] for piece in (*prompts, *tokens)]
        assert torch.equal(logits(runner, *prompts, decode=tokens), torch.cat(order))


def test_bfloat16_keeps_close_to_float32() -> None:
    tokens = random_tokens(100)
    wide, narrow = (logits(load(SHIPPED, dtype), prefill(tokens)) for dtype in ("float32", "bfloat16"))
    assert (wide.softmax(-1) - narrow.softmax(-1)).abs().sum(-1).mean() < 0.1
