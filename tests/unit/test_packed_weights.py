"""Packed weights come back from their file bit for bit, or not at all."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.model_configs import load, logits, moe_without_shared_experts, prefill, random_tokens
from tests.unit.test_model_native import needs_compiler
from workers.config import WorkerConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.cpu.runner import packed_file
from workers.model.native.build import build
from workers.model.native.ernie import NativeErnie
from workers.model.native.library import Library
from workers.model.native.packed import PackedFile


def runs(seed: int = 0, sizes: tuple[int, ...] = (10_000_001, 64)) -> list[memoryview]:
    """Memory of several pieces, and of one."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes)
    return [memoryview(bytearray(values.numpy())) for values in made]


def empty_runs() -> list[memoryview]:
    return [memoryview(bytearray(b"\1" * len(run))) for run in runs()]


def file_in(folder: Path, limit_bytes: int = 1 << 30, facts: tuple[str, ...] = ("model",)) -> PackedFile:
    return PackedFile(folder, limit_bytes, facts, num_threads=2, worth_bytes=0)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = file_in(tmp_path / "new")
    assert file.write(runs())
    found = empty_runs()
    assert file.read(found)
    assert found == runs()


@pytest.mark.parametrize("place", ["magic", "header", "first piece", "last byte", "cut short", "one byte more"])
def test_a_damaged_file_is_deleted_and_leaves_nothing_behind(tmp_path: Path, place: str) -> None:
    file = file_in(tmp_path)
    file.write(runs())
    content = bytearray(file.path.read_bytes())
    at = {"magic": 0, "header": 100, "first piece": 4096 + 77, "last byte": -1}
    if place in at:
        content[at[place]] ^= 4
    file.path.write_bytes(content[:-1] if place == "cut short" else content + b"\0" * (place == "one byte more"))
    found = empty_runs()
    assert not file.read(found)
    assert not file.path.exists()
    assert not any(any(run) for run in found)


def test_a_file_of_other_weights_is_not_read(tmp_path: Path) -> None:
    file = file_in(tmp_path)
    file.write(runs())
    assert not file_in(tmp_path, facts=("another",)).read(empty_runs())
    os.rename(file.path, file_in(tmp_path, facts=("another",)).path)
    assert not file_in(tmp_path, facts=("another",)).read(empty_runs())
    file.write(runs())
    assert not file.read(empty_runs()[:1])


def test_the_files_used_last_stay_within_the_limit(tmp_path: Path) -> None:
    files = [file_in(tmp_path, 2_500_000, (name,)) for name in "abc"]
    kept = [runs(seed, (1_000_000,)) for seed in range(3)]
    for at, (file, weights) in enumerate(zip(files[:2], kept, strict=False)):
        assert file.write(weights)
        os.utime(file.path, (at, at))
    assert files[0].read(kept[0])  # so the second one is older now
    assert files[2].write(kept[2])
    assert [file.path.exists() for file in files] == [True, False, True]
    assert not file_in(tmp_path, 999_999, ("d",)).write(kept[0])


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    assert not file_in(tmp_path / "file").write(runs())
    assert "packed weights are not kept" in caplog.text
    assert not file_in(tmp_path / "file").read(empty_runs())


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "weights.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not file_in(tmp_path).write(runs())
    assert file_in(tmp_path).write(runs())


def test_a_writer_that_is_stopped_or_was_killed_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "weights-0.packed.partial").write_bytes(b"of a writer that was killed")
    file = file_in(tmp_path)
    assert not file.write(runs(), must_stop=lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.lock"]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_start_takes_the_kept_weights_and_any_number_of_threads_packs_the_same(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """The second checkpoint has other values, so that they tell where weights came from."""
    folders = [moe_without_shared_experts(tmp_path / name).folder for name in "ab"]
    other = folders[1] / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(other).items()}, other)
    library = Library(build(None))
    packed = file_in(tmp_path / "cache")

    def weights(folder: Path, num_threads: int, packed: PackedFile | None) -> list[bytes]:
        model = NativeErnie(ErnieConfig.load(folder), Checkpoint(folder), dtype, library, num_threads, packed=packed)
        if model.keeping is not None:
            model.keeping.join()
        return [bytes(run) for run in library.weights(model._model)]

    first = weights(folders[0], 3, packed)
    assert packed.path.exists()
    assert first == weights(folders[0], 1, None) != weights(folders[1], 1, None)
    assert first == weights(folders[1], 2, packed)


@needs_compiler
def test_a_checkpoint_that_was_written_anew_is_packed_anew(tmp_path: Path) -> None:
    folder = moe_without_shared_experts(tmp_path / "model").folder
    library = Library(build(None))
    config = WorkerConfig(model=str(folder), cache_folder=str(tmp_path), packed_weights_bytes=1 << 30)
    before = packed_file(config, Checkpoint(folder), library)
    assert before is not None and before == packed_file(config, Checkpoint(folder), library)
    os.utime(folder / "model.safetensors", (1, 1))
    after = packed_file(config, Checkpoint(folder), library)
    assert after is not None and after.path != before.path
    assert packed_file(replace(config, packed_weights_bytes=0), Checkpoint(folder), library) is None


@needs_compiler
def test_a_worker_that_may_keep_weights_computes_what_one_that_may_not_does(tmp_path: Path) -> None:
    folder = moe_without_shared_experts(tmp_path / "model").folder
    tokens = random_tokens(70)
    plain = logits(load(folder), prefill(tokens))
    assert torch.equal(logits(load(folder, packed_weights_bytes=1 << 30, num_threads=2), prefill(tokens)), plain)
