"""The C++ kernels: how they come to be, what happens without them, and that they compute what PyTorch's kernels do."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.unit.model_configs import (
    decode,
    load,
    logits,
    moe_with_shared_experts,
    prefill,
    random_tokens,
    small_dense,
)
from workers.machine.native_build import BuildFailed, compile_library
from workers.model.native.build import KERNELS, supported
from workers.model.native.ernie import NativeErnie
from workers.model.native.library import Library
from workers.model.native.loading import check

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not supported(),
    reason="the kernels need a C++ compiler, and AVX2 with FMA or NEON",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_with_shared_experts(tmp_path_factory.mktemp("checkpoint")).folder


@needs_compiler
def test_the_kernels_are_compiled_once_by_whoever_comes_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_best = partial(compile_library, KERNELS, supported()[0])
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(2) as threads:
        first, second = threads.map(compile_best, [tmp_path / "cache"] * 2)
    assert first == second == compile_best(tmp_path / "cache")
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".lock", ".so"]
    assert sum("compiled in" in record.message for record in caplog.records) == 1
    check(Library(first), supported()[0].name)


@needs_compiler
def test_without_a_compiler_the_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="no C\\+\\+ compiler"):
        compile_library(KERNELS, supported()[0], tmp_path, compilers=("no-such-compiler",))


@needs_compiler
def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"nothing")
    with pytest.raises(BuildFailed, match="cannot be loaded"):
        Library(broken)


def test_a_model_that_the_kernels_cannot_compute_is_served_by_pytorch_with_the_reason(tmp_path: Path) -> None:
    narrow = small_dense(tmp_path / "narrow").folder
    runner = load(narrow)
    assert not isinstance(runner.model, NativeErnie)
    assert runner.warnings[0] == (
        "computing with PyTorch's kernels, which is slower: "
        "the C++ kernels need a head_dim that is a multiple of 32; it is 16"
    )
    assert load(narrow, native=False).warnings == ()


@needs_compiler
def test_workers_with_different_kernels_do_not_pair(folder: Path) -> None:
    native, plain = load(folder), load(folder, native=False)
    assert isinstance(native.model, NativeErnie) and not isinstance(plain.model, NativeErnie)
    assert native.model_info.fingerprint != plain.model_info.fingerprint
    assert native.model_info.fingerprint == load(folder).model_info.fingerprint


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_the_kernels_compute_what_pytorch_does(folder: Path, dtype: str, tolerance: float) -> None:
    native, plain = load(folder, dtype), load(folder, dtype, native=False)
    tokens = random_tokens(200)
    steps = (
        dict(pieces=[prefill(tokens)], decode=[]),
        dict(pieces=[], decode=[decode(9, 200), decode(8, 70, range(8, 16))]),
    )
    for step in steps:
        found, expected = (logits(r, *step["pieces"], decode=step["decode"]).softmax(-1) for r in (native, plain))
        assert (found - expected).abs().sum(-1).mean() < tolerance


@needs_compiler
def test_the_most_likely_token_is_that_of_the_logits(folder: Path) -> None:
    runner = load(folder, "bfloat16")
    x_RD = torch.randn(9, runner.model.config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert runner.model.greedy(x_RD) == runner.model.logits(x_RD).argmax(-1).tolist()


@needs_compiler
def test_decode_and_prefill_write_the_same_bits(folder: Path) -> None:
    """More than the engine relies on: with these kernels a decoded row equals the same row of a prompt."""
    runner, tokens = load(folder, "bfloat16"), random_tokens(90)
    whole = logits(runner, prefill(tokens))
    logits(runner, prefill(tokens[:60], table=range(8, 16)))
    rows = [logits(runner, decode=[decode(tokens[i], i, range(8, 16))]) for i in range(60, 90)]
    assert torch.equal(torch.cat(rows), whole[60:])
