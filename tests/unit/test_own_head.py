"""A stored head is the head, whatever config.json says; equal copies of the embeddings are no head of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.model_configs import greedy, load, random_tokens, small_dense
from workers.config import WorkerConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint, with_stored_head
from workers.model.cpu.rank_runner import load_rank
from workers.model.cuda.runner import CudaRunner
from workers.model.parallel.collectives import Links
from workers.model.parallel.expert_placement import Placement

PROMPT = random_tokens(40, seed=9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights with a head that is not the embeddings: config.json says that it is, and that it is not."""
    found = []
    for is_tied in (True, False):
        folder = tmp_path_factory.mktemp("tied" if is_tied else "untied")
        small_dense(folder)
        tensors = load_file(folder / "model.safetensors")
        own = tensors["model.embed_tokens.weight"].flip(0).contiguous()
        save_file({**tensors, "lm_head.weight": own}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": is_tied}))
        found.append(folder)
    return found[0], found[1]


@pytest.mark.parametrize("native", [True, False])
def test_one_rank_uses_it(folders: tuple[Path, Path], native: bool) -> None:
    said, true = (greedy(load(folder, native=native), PROMPT, 12) for folder in folders)
    assert said == true


@pytest.mark.parametrize("native", [True, False])
def test_a_rank_of_a_group_uses_it(folders: tuple[Path, Path], native: bool) -> None:
    settings = [WorkerConfig(model=str(folder), native=native, max_model_len=256) for folder in folders]
    said, true = (greedy(load_rank(one, 0, Links(), Placement(1, ()), 8), PROMPT, 12, range(4)) for one in settings)
    assert said == true


def test_a_gpu_uses_it(folders: tuple[Path, Path]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for folder in folders:
        config = WorkerConfig(model=str(folder), device="cuda", max_model_len=128, kv_memory_bytes=1 << 20)
        model = CudaRunner.load_on(config, device)._model
        assert not model.config.tie_word_embeddings


def test_equal_copies_are_tied_and_any_difference_counts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(folders[0] / "model.safetensors")
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    embeddings = tensors["model.embed_tokens.weight"]
    last = embeddings.clone()
    last[-1, -1] += 1
    for head, is_tied in ((embeddings.clone(), True), (last, False), (embeddings.bfloat16(), False)):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
        assert with_stored_head(ErnieConfig.load(tmp_path), Checkpoint(tmp_path)).tie_word_embeddings is is_tied
