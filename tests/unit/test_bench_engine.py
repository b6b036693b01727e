"""bench/engine.py's arithmetic: limits, targets, tables, agreement of tokens. No engine runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))  # scripts, no package: they import one another by name

from engine_report import number, report, table  # noqa: E402
from engine_runs import compare_tokens  # noqa: E402
from json_worker import random_prompt  # noqa: E402
from model_shapes import BIG, DENSE, SHAPES, SMALL, Shape  # noqa: E402
from random_checkpoints import MAX_LEN, random_checkpoint, token_pieces  # noqa: E402
from roofline import (  # noqa: E402
    Machine,
    best,
    decode_bytes,
    decode_flops,
    decode_limit,
    experts_hit,
    prefill_flops,
    prefill_limit,
)
from targets import Verdict, ratio, verdicts  # noqa: E402
from worker_process import Program, WorkerFailed, WorkerProcess  # noqa: E402

from workers.model.ernie_config import ErnieConfig  # noqa: E402
from workers.model.weights import Checkpoint  # noqa: E402
from workers.tokenizer import Tokenizer  # noqa: E402

TINY_MOE = Shape("tiny", 300, 32, 3, 4, 2, 8, 64, 4, 2, 16, 2)


def test_shapes_have_the_sizes_that_their_names_promise() -> None:
    assert DENSE.total_params == pytest.approx(0.361e9, rel=0.01)
    assert DENSE.kv_bytes_per_token == 18432
    assert SMALL.total_params == pytest.approx(0.1e9, rel=0.1)
    assert BIG.total_params == pytest.approx(1.3e9, rel=0.05)
    for shape in SHAPES.values():
        assert shape.active_params <= shape.total_params
        if shape.num_experts:  # llama.cpp's converter derives the shared experts' width from these
            assert shape.intermediate_size == shape.num_kv_heads * shape.num_shared_experts * shape.expert_size


@pytest.mark.parametrize("shape", [replace(TINY_MOE, num_experts=0), TINY_MOE], ids=["dense", "moe"])
def test_a_checkpoint_holds_what_its_config_calls_for(tmp_path: Path, shape: Shape) -> None:
    folder = random_checkpoint(shape, tmp_path)
    assert (
        Checkpoint(folder).num_parameters() == shape.total_params + shape.num_moe_layers * shape.num_experts
    )  # biases
    assert ErnieConfig.load(folder).max_position_embeddings == MAX_LEN
    assert Tokenizer.load(folder).vocab_size == shape.vocab_size
    assert random_checkpoint(shape, tmp_path) == folder


def test_a_seed_gives_the_same_weights_and_prompts_again(tmp_path: Path) -> None:
    names = [random_checkpoint(TINY_MOE, tmp_path / place, seed) for place, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, again, other = [sorted(folder.glob("*.safetensors"))[1].read_bytes() for folder in names]
    assert first == again != other
    assert random_prompt(9, 1000, seed=3) == random_prompt(9, 1000, seed=3) != random_prompt(9, 1000, seed=4)


def test_a_vocabulary_has_no_piece_twice() -> None:
    pieces = token_pieces(1000)
    assert len(set(pieces)) == 1000


def test_one_token_hits_its_own_experts_and_many_hit_all() -> None:
    assert experts_hit(SMALL, 1) == pytest.approx(SMALL.experts_per_token)
    assert experts_hit(SMALL, 1000) == pytest.approx(SMALL.num_experts)
    assert experts_hit(DENSE, 8) == 0


def test_a_dense_step_reads_all_weights_once_and_the_cache_of_every_sequence() -> None:
    assert decode_bytes(DENSE, 1, 0) == DENSE.total_params * 2
    assert decode_bytes(DENSE, 8, 100) == DENSE.total_params * 2 + 800 * 18432


def test_a_mixture_reads_the_experts_hit_and_its_routers_in_fp32() -> None:
    step = decode_bytes(BIG, 1, 0)
    assert step == pytest.approx(BIG.active_params * 2 + BIG.router_params * 2)


def test_prefill_multiplies_active_parameters_and_half_the_square_of_the_context() -> None:
    square = 2 * 18 * 16 * 128 * 512**2
    expected = 2 * (DENSE.total_params - DENSE.head_params) * 512 + square + 2 * DENSE.head_params
    assert prefill_flops(DENSE, 512) == expected


def test_the_limit_is_memory_at_batch_one_and_arithmetic_at_large_batches() -> None:
    machine = Machine(read_bytes_per_s=50e9, flops_per_s=400e9)
    assert decode_limit(machine, DENSE, 1, 0) == pytest.approx(50e9 / decode_bytes(DENSE, 1, 0))
    assert decode_limit(machine, DENSE, 64, 0) == pytest.approx(64 * 400e9 / decode_flops(DENSE, 64, 0))
    assert prefill_limit(machine, DENSE, 512) == pytest.approx(512 * 400e9 / prefill_flops(DENSE, 512))


def test_the_best_measurement_is_the_limit() -> None:
    assert best([Machine(1.0, 9.0), Machine(2.0, 3.0)]) == Machine(2.0, 9.0)


def test_ratios_are_over_the_fastest_peer_that_was_measured() -> None:
    figures = {"baton": {"decode 8": 60.0}, "transformers": {"decode 8": 20.0}, "continuous": {"decode 8": 30.0}}
    assert ratio(figures, "decode 8", "transformers", "continuous") == 2.0
    assert ratio(figures, "decode 8", "llama") is None
    assert ratio(figures, "decode 1", "transformers") is None


def test_a_target_is_met_missed_or_not_measured() -> None:
    assert Verdict("speed", 3.0, 3.0).is_met is True
    assert Verdict("speed", 2.9, 3.0).is_met is False
    assert Verdict("overhead", 0.06, 0.05, at_most=True).is_met is False
    assert Verdict("speed", None, 3.0).is_met is None


def test_every_model_has_its_own_targets() -> None:
    figures = {"baton": {"decode 1": 80.0}, "llama": {"decode 1": 100.0}}
    found = {name: {v.name: v for v in verdicts(name, figures, {"decode 1": 100.0})} for name in SHAPES}
    assert found["small"]["decode 1 over llama.cpp"].is_met is True
    assert found["big"]["decode 1 over llama.cpp"].is_met is False
    assert found["dense"]["decode 1 over roofline"].value == 0.8
    assert "decode 1 over roofline" not in found["big"]


def test_tokens_are_right_when_baton_agrees_with_transformers_in_fp32() -> None:
    tokens = {"transformers float32": [1, 2, 3], "baton float32": [1, 2, 3], "llama bfloat16": [1, 9, 3]}
    sentences, is_right = compare_tokens(tokens)
    assert is_right
    assert any("llama bfloat16: the first 1 of 3" in sentence for sentence in sentences)
    assert not compare_tokens(tokens | {"baton float32": [1, 2, 4]})[1]
    assert compare_tokens({"baton float32": [1]})[1]


def test_a_missing_peer_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    script = tmp_path / "absent_worker.py"
    script.write_text("import a_package_that_nobody_has")
    with pytest.raises(WorkerFailed, match=r"not installed.*pip install it"):
        WorkerProcess(Program("llama", sys.executable, str(script), (), "pip install it"), tmp_path)


def test_a_worker_answers_errors_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "small_worker.py"
    script.write_text(
        f"import sys; sys.path.append({str(BENCH)!r})\nfrom json_worker import serve\nserve('1.0', print)"
    )
    with WorkerProcess(Program("baton", sys.executable, str(script)), tmp_path) as worker:
        assert worker.version == "1.0"
        with pytest.raises(WorkerFailed, match="AttributeError"):
            worker.ask("dance")
        assert worker.ask("memory")["peak_bytes"] > 0


def test_numbers_and_tables_line_up() -> None:
    assert [number(None), number(12.34), number(1234.5), number(0.5, 2)] == ["-", "12.3", "1234", "0.50"]
    lines = list(table(["a", "longer"], iter([["row", "1"], ["x", "-"]])))
    assert lines == ["| a   | longer |", "|-----|-------:|", "| row |      1 |", "| x   |      - |"]


def test_a_report_without_peers_says_so() -> None:
    model = {
        "total_params": 1,
        "active_params": 1,
        "figures": {"baton": {"decode 1": 10.0}},
        "limits": {"decode 1": 20.0},
        "tokens": [],
        "failures": ["llama load: out of memory"],
    }
    machine = {
        "date": "2026-01-01", "cpu": "a CPU", "num_cores": 2, "num_threads": 2, "read_bytes_per_s": 5e10,
        "flops_per_s": 4e11, "foreign_share": 0.25, "seconds": 600,
    }  # fmt: skip
    results = {"machine": machine, "repeats": 3, "engines": {"llama": "not installed"}, "models": {"big": model}}
    text = report(json.loads(json.dumps(results)))
    assert "llama.cpp: not installed" in text
    assert "| decode 1     |  10.0 |     20.0 |             0.50 |" in text
    assert "not measured" in text
    assert "failed: llama load: out of memory" in text
