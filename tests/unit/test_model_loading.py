"""A checkpoint loads whole or is refused with one sentence that names what is wrong."""

from __future__ import annotations

import bisect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.model_configs import (
    SHIPPED,
    load,
    logits,
    moe_with_shared_experts,
    prefill,
    random_tokens,
    small_dense,
)
from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.cpu.runner import TorchRunner, require_memory
from workers.model.decoder.layers import can_pack, compute_dtype
from workers.runner import Batch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return moe_with_shared_experts(tmp_path_factory.mktemp("original"), num_hidden_layers=3).folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy-PT"))


def refusal(folder: Path | str, **changes: Any) -> str:
    with pytest.raises(InvalidConfig) as error:
        TorchRunner.load(WorkerConfig(model=str(folder), **{"kv_memory_bytes": 64 << 20, **changes}))
    return str(error.value)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replaces or adds tensors; None drops one."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    kept = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def test_a_sharded_checkpoint_computes_what_its_single_file_does(tmp_path: Path) -> None:
    oracle = small_dense(tmp_path / "whole")
    oracle.model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    tokens = random_tokens(70)
    whole, shards = (logits(load(tmp_path / name), prefill(tokens)) for name in ("whole", "shards"))
    assert torch.equal(whole, shards)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    small_dense(tmp_path / "whole").model.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


def test_a_shard_outside_the_folder_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    assert "outside the checkpoint folder" in refusal(copy)


def test_what_is_no_pt_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert '"-PT"' in refusal("baidu/ERNIE-4.5-0.3B-Paddle")
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path)


def test_paddle_tensor_names_are_refused(copy: Path) -> None:
    edit_weights(copy, {"ernie.norm.weight": torch.zeros(96)})
    assert '"-PT"' in refusal(copy)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": "ernie4_5_moe_vl"}, "model_type 'ernie4_5_moe_vl'"),
        ({"vision_config": {"depth": 32}}, "vision-language"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"use_bias": True}, "use_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": None}, "'yarn'"),
        ({"hidden_size": None}, "integer hidden_size"),
        ({"num_key_value_heads": 4}, "multiple of its 4"),
        ({"moe_k": 9}, "moe_k 9"),
        ({"moe_num_experts": 6}, "calls for [1, 6]"),
        ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
        ({"num_hidden_layers": 4, "moe_layer_end_index": 3}, "no tensor model.layers.3."),
        ({"num_hidden_layers": 2}, "is not part of the model"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(copy: Path, changes: dict[str, Any], expected: str) -> None:
    edit_json(copy / "config.json", **changes)
    assert expected in refusal(copy)


def test_tensors_that_do_not_fit_are_named(copy: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_weights(copy, {name: None})
    assert f"no tensor {name}" in refusal(copy)
    edit_weights(copy, {name: torch.zeros(3, 96)})
    assert f"{name} in" in refusal(copy) and "[3, 96]" in refusal(copy)
    edit_weights(copy, {name: torch.zeros(192, 96, dtype=torch.int8)})
    assert "is I8; quantized" in refusal(copy)


def test_a_tensor_that_nothing_uses_is_refused_but_mtp_weights_are_ignored(copy: Path) -> None:
    edit_weights(copy, {"model.mtp_emb_norm.0.weight": torch.zeros(96)})
    load(copy)
    edit_weights(copy, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(192)})
    assert "q_proj.bias" in refusal(copy)


def test_a_damaged_weight_file_is_named(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not a weight file")
    assert "model.safetensors cannot be read" in refusal(copy)


def test_layer_ranges_may_be_lists(copy: Path) -> None:
    tokens = random_tokens(20)
    before = logits(load(copy), prefill(tokens))
    edit_json(copy / "config.json", moe_layer_start_index=[1, 1], moe_layer_end_index=[2, 2])
    assert torch.equal(logits(load(copy), prefill(tokens)), before)


def test_end_tokens_come_from_the_generation_config_first(copy: Path) -> None:
    assert load(SHIPPED).eos_token_ids == tuple(
        json.loads((SHIPPED / "generation_config.json").read_text())["eos_token_id"]
    )
    edit_json(copy / "generation_config.json", eos_token_id=7)
    assert load(copy).eos_token_ids == (7,)
    (copy / "generation_config.json").unlink()
    edit_json(copy / "config.json", eos_token_id=[2, 9])
    assert load(copy).eos_token_ids == (2, 9)


def test_the_fingerprint_names_weights_config_and_dtype_but_not_the_path_or_the_pool(
    checkpoint: Path, copy: Path
) -> None:
    def fingerprint(folder: Path, **fields: Any) -> str:
        return load(folder, **fields).model_info.fingerprint

    original = fingerprint(checkpoint)
    assert fingerprint(copy, num_blocks=20) == original
    assert fingerprint(copy, dtype="bfloat16") != original
    edit_weights(copy, {"model.norm.weight": torch.ones(96)})
    changed = fingerprint(copy)
    edit_json(copy / "config.json", rms_norm_eps=1e-6)
    assert len({original, changed, fingerprint(copy)}) == 3


def test_model_info_says_what_a_router_needs(copy: Path) -> None:
    info = load(copy).model_info
    assert (info.name, info.vocab_size, info.max_model_len, info.block_size) == ("copy-PT", 500, 1024, 64)
    assert load(copy, served_model_name="ernie").model_info.name == "ernie"


def test_a_pool_too_small_for_one_sequence_is_refused_with_figures(checkpoint: Path) -> None:
    message = refusal(checkpoint, kv_memory_bytes=1 << 20, max_model_len=1000)
    assert "1.0 MiB" in message and "sequence of 1000 tokens" in message
    assert "above the model's 1024 positions" in refusal(checkpoint, max_model_len=1025)
    assert "are free" in refusal(checkpoint, kv_memory_bytes=1 << 50)
    assert "device" in refusal(checkpoint, device="cuda")


def test_the_automatic_pool_holds_at_most_64_full_sequences(checkpoint: Path) -> None:
    runner = TorchRunner.load(WorkerConfig(model=str(checkpoint), max_model_len=100))
    assert runner.kv_memory.layout.num_blocks == 64 * 2


def needed_bytes(folder: Path, *, copies_tied_head: bool) -> int:
    """The least free memory with which a checkpoint loads in float32."""
    arguments = Checkpoint(folder), ErnieConfig.load(folder), torch.float32

    def is_enough(free_bytes: int) -> bool:
        try:
            require_memory(*arguments, free_bytes=free_bytes, copies_tied_head=copies_tied_head)
        except InvalidConfig:
            return False
        return True

    return bisect.bisect_left(range(1 << 24), True, key=is_enough)


def test_a_model_larger_than_the_free_memory_is_refused_with_figures(checkpoint: Path) -> None:
    arguments = Checkpoint(checkpoint), ErnieConfig.load(checkpoint), torch.float32
    with pytest.raises(InvalidConfig, match=r"needs 2.0 MiB in float32, but 0.1 MiB are free"):
        require_memory(*arguments, free_bytes=100_000, copies_tied_head=True)
    with pytest.raises(InvalidConfig, match=r"needs 1.9 MiB in float32, but 0.1 MiB are free"):
        require_memory(*arguments, free_bytes=100_000, copies_tied_head=False)


def test_a_model_that_is_computed_wider_than_it_is_served_is_refused_with_what_it_takes(checkpoint: Path) -> None:
    arguments = Checkpoint(checkpoint), ErnieConfig.load(checkpoint), torch.bfloat16
    with pytest.raises(InvalidConfig, match=r"needs 1.0 MiB in bfloat16, but 0.1 MiB are free$"):
        require_memory(*arguments, free_bytes=100_000, copies_tied_head=True)
    with pytest.raises(InvalidConfig, match=r"needs 2.0 MiB in float32, but 0.1 MiB are free; .* C\+\+ kernels"):
        require_memory(*arguments, free_bytes=100_000, copies_tied_head=True, packed_dtype=torch.float32)


def test_bfloat16_is_computed_in_float32_where_it_has_no_instructions_and_keys_and_values_stay_narrow(
    checkpoint: Path,
) -> None:
    runner = load(checkpoint, "bfloat16", native=False)
    wide = compute_dtype(torch.bfloat16)
    assert wide is (torch.bfloat16 if can_pack(torch.bfloat16) else torch.float32)
    assert {linear.dtype for linear in runner.model.linears} <= {wide, torch.float32}  # a router's are always float32
    assert runner.model.linears[0].dtype is wide and runner.kv_memory.layout.dtype == "bfloat16"
    assert runner.hidden_states(Batch(prefill=(prefill([5, 6, 7]),))).dtype is wide
    assert compute_dtype(torch.float32) is torch.float32


def test_a_tied_head_is_counted_once_where_it_is_kept_once_and_a_stored_copy_never(
    checkpoint: Path, copy: Path
) -> None:
    weights = load_file(checkpoint / "model.safetensors").values()
    weights_bytes = sum(4 * tensor.numel() for tensor in weights)
    head_bytes = 4 * 500 * 96
    assert needed_bytes(checkpoint, copies_tied_head=False) == weights_bytes
    assert needed_bytes(checkpoint, copies_tied_head=True) == weights_bytes + head_bytes
    edit_weights(copy, {"lm_head.weight": torch.ones(500, 96)})
    assert needed_bytes(copy, copies_tied_head=False) == weights_bytes
