"""bench/engine.py's arithmetic: limits, targets, tables, agreement of tokens. No engine runs."""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))  # scripts, no package: they import one another by name

from baton_worker import TimedRunner, known_settings, library_origins  # noqa: E402
from busy_core import busy_core  # noqa: E402
from engine import limits, programs  # noqa: E402
from engine_loads import forget, keep_only_kernels, read_once, weight_files  # noqa: E402
from engine_report import number, report, table  # noqa: E402
from engine_runs import expected_s  # noqa: E402
from engine_tokens import compare_tokens  # noqa: E402
from json_worker import random_prompt  # noqa: E402
from llama_state import UnknownState, lengthen  # noqa: E402
from machine_worker import products  # noqa: E402
from model_shapes import BIG, DENSE, SHAPES, SMALL, Shape  # noqa: E402
from profile_samples import PYTHON, SERIAL, WAITING, Sample, shares, stepping_and_helping  # noqa: E402
from random_checkpoints import MAX_LEN, random_checkpoint, token_pieces  # noqa: E402
from roofline import (  # noqa: E402
    Machine,
    best,
    decode_bytes,
    decode_flops,
    decode_limit,
    experts_hit,
    limit,
    prefill_flops,
    prefill_limit,
)
from targets import Verdict, ratio, verdicts  # noqa: E402
from worker_process import Program, WorkerFailed, WorkerProcess  # noqa: E402
from workloads import LONG, LONG_POOL_TOKENS, PREFILLS, SHORT, Workload  # noqa: E402

import workers  # noqa: E402
from workers.engine.fake_runner import FakeRunner  # noqa: E402
from workers.kv_memory.memory import KvLayout, KvMemory  # noqa: E402
from workers.model.checkpoint.ernie_config import ErnieConfig  # noqa: E402
from workers.model.checkpoint.weights import Checkpoint  # noqa: E402
from workers.request import SamplingParams  # noqa: E402
from workers.runner import Batch, SampleSpec, SequenceSlice  # noqa: E402
from workers.text.tokenizer import Tokenizer  # noqa: E402

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
    assert best([Machine(1.0, 9.0, "bf16"), Machine(2.0, 3.0, "fp32")]) == Machine(2.0, 9.0, "bf16")


def test_every_host_has_a_product_to_be_measured_by() -> None:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        found = dict(products(torch.randn(8, 64).to(dtype), torch.randn(32, 64).to(dtype)))
        assert f"{name} F.linear" in found
        for run in found.values():
            run()


def test_a_long_context_is_read_again_by_every_step() -> None:
    machine = Machine(read_bytes_per_s=50e9, flops_per_s=400e9)
    step_s = 8 / limit(machine, DENSE, Workload("decode", 8, 8192), 8)
    assert step_s == pytest.approx((DENSE.total_params * 2 + 8 * 8196 * DENSE.kv_bytes_per_token) / 50e9)
    assert limit(machine, DENSE, Workload("prefill", 1, 16384), 8) == prefill_limit(machine, DENSE, 16384)


def test_every_workload_has_a_limit_and_a_name_of_its_own() -> None:
    found = limits(SMALL, Machine(50e9, 400e9), 32)
    assert set(found) == {workload.name for workload in (*SHORT, *LONG)}
    assert len(found) == len(SHORT) + len(LONG)
    assert all(workload.batch * workload.context < LONG_POOL_TOKENS for workload in LONG)


def test_a_long_prompt_is_expected_to_take_as_long_as_its_arithmetic_at_the_speed_of_a_short_one() -> None:
    long, short = Workload("prefill", 1, 16384), PREFILLS[1]
    assert expected_s(SMALL, short, short, 100.0) == pytest.approx(20.48)
    assert expected_s(SMALL, long, short, 100.0) == pytest.approx(
        20.48 * prefill_flops(SMALL, 16384) / prefill_flops(SMALL, 2048)
    )


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


def test_targets_are_those_of_the_model_and_of_the_workload() -> None:
    figures = {
        "baton": {"decode 1": 70.0, "decode 8": 70.0, "prefill 512": 70.0},
        "llama": {"decode 1": 70.0, "decode 8": 70.0, "prefill 512": 50.0},
        "transformers": {"decode 8": 20.0},
        "continuous": {"decode 8": 28.0},
    }
    found = {name: {v.name: v for v in verdicts(name, figures, {"decode 1": 100.0})} for name in SHAPES}
    assert found["small"]["decode 1 over roofline"].is_met is True
    assert found["dense"]["decode 1 over roofline"].is_met is False
    assert found["dense"]["decode 1 over llama.cpp"].is_met is True
    assert found["dense"]["decode 8 over llama.cpp"].is_met is False
    assert found["dense"]["decode 8 over transformers"].is_met is True
    assert found["dense"]["prefill 512 over llama.cpp"].is_met is True
    assert found["dense"]["prefill 2048 over llama.cpp"].is_met is None


def test_long_contexts_busy_cores_and_loads_have_targets_where_they_were_measured() -> None:
    names = {v.name for v in verdicts("dense", {"baton": {"decode 1": 1.0}}, {})}
    assert not any("8192" in name or "busy" in name or "cold" in name for name in names)
    figures = {
        "baton": {
            "decode 1": 100.0, "decode 1, one core busy": 40.0, "decode 1 at 8192": 50.0,
            "cold read, s": 2.0, "cold load, s": 2.4, "second load, s": 0.2,
        },
        "llama": {"decode 1 at 8192": 40.0, "second load, s": 0.1},
    }  # fmt: skip
    found = {v.name: v for v in verdicts("dense", figures, {"decode 1 at 8192": 60.0})}
    assert found["decode 1, one core busy, over quiet"].is_met is False
    assert found["decode 1 at 8192 over llama.cpp"].is_met is True
    assert found["decode 1 at 8192 over roofline"].is_met is True
    assert found["cold load over reading the files"].is_met is True
    assert found["second load over llama.cpp's"].value == 2.0


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


def run_of(num_threads: int, figures: dict[str, dict[str, float]]) -> dict[str, object]:
    return {
        "num_threads": num_threads,
        "figures": figures,
        "limits": {"decode 1": 20.0, "decode 1 at 8192": 4.0},
        "descriptions": {"baton": "computing with the C++ kernels for avx2"},
        "failures": ["llama load: out of memory"],
    }


def results_of(*runs: dict[str, object]) -> dict[str, object]:
    model = {"total_params": 1, "active_params": 1, "loads": {}, "runs": runs, "tokens": [], "failures": []}
    reached = {"read_bytes_per_s": 5e10, "flops_per_s": 4e11, "product": "fp32 F.linear"}
    machine = {
        "date": "2026-01-01", "cpu": "a CPU", "num_cores": 2, "reached": {str(run["num_threads"]): reached for run in runs},
        "foreign_share": 0.25, "seconds": 600,
    }  # fmt: skip
    results = {"machine": machine, "repeats": 3, "engines": {"llama": "not installed"}, "models": {"big": model}}
    found: dict[str, object] = json.loads(json.dumps(results))
    return found


def test_a_report_without_peers_says_so() -> None:
    text = report(results_of(run_of(2, {"baton": {"decode 1": 10.0}})))
    assert "llama.cpp: not installed" in text
    assert "| decode 1     |  10.0 |     20.0 |             0.50 |" in text
    assert "not measured: llama load: out of memory" in text
    assert "400 GFLOP/s (fp32 F.linear)" in text
    assert "Baton: computing with the C++ kernels for avx2" in text
    assert "8192" not in text
    assert "busy" not in text


def test_a_report_shows_what_a_second_thread_brings_and_what_a_busy_core_takes() -> None:
    first = run_of(1, {"baton": {"decode 1": 10.0}})
    second = run_of(2, {"baton": {"decode 1": 18.0, "decode 1, one core busy": 9.0, "decode 1 at 8192": 3.0}})
    lines = report(results_of(first, second)).splitlines()
    assert any(line.startswith("| times the speed with 1 thread | Baton, 2 threads |") for line in lines)
    assert any(line.startswith("| decode 1 ") and line.endswith(" 1.80 |") for line in lines)
    assert any(line.startswith("| decode 1 ") and line.endswith(" 0.50 |") for line in lines)
    assert any(line.startswith("| decode 1 at 8192 |   3.0 |      4.0 |") for line in lines)


def llama_state(num_cells: int, *, rows: bytes, is_transposed: int = 0) -> bytes:
    """One layer whose keys and values have rows of 2 bytes, in the second of two streams."""
    cells = b"".join(struct.pack("<iIi", position, 1, 7) for position in range(num_cells))
    matrix = struct.pack("<iQ", 1, 2) + rows
    return struct.pack("<IiIII", 9, 7, 2, 0, num_cells) + cells + struct.pack("<II", is_transposed, 1) + matrix * 2


def test_a_state_of_llama_is_lengthened_by_repeating_its_rows() -> None:
    assert lengthen(llama_state(2, rows=b"aabb"), 5) == llama_state(5, rows=b"aabbaabbaa")


def test_a_state_of_another_layout_is_refused() -> None:
    state = llama_state(2, rows=b"aabb")
    with pytest.raises(UnknownState, match="transposed"):
        lengthen(llama_state(2, rows=b"aabb", is_transposed=1), 5)
    with pytest.raises(UnknownState, match="left over"):
        lengthen(state + b"x", 5)
    with pytest.raises(UnknownState, match="ends after"):
        lengthen(state[:-1], 5)
    with pytest.raises(UnknownState, match="positions"):
        lengthen(state.replace(struct.pack("<iIi", 1, 1, 7), struct.pack("<iIi", 1, 2, 7)), 5)


def test_a_setting_that_the_worker_does_not_have_is_refused() -> None:
    assert known_settings({"instruction_set": "avx2", "served_model_name": ""}) == {"instruction_set": "avx2"}
    with pytest.raises(SystemExit, match="no_such_setting"):
        known_settings({"no_such_setting": "x"})


def test_a_prompt_that_is_not_computed_gets_noise_of_its_own_and_goes_on_with_its_last_token() -> None:
    memory = KvMemory(KvLayout(3, 2, 1, 64, 32, "bfloat16", 2))
    runner = TimedRunner(FakeRunner(memory))
    spec = SampleSpec(SamplingParams(), 0, 0, (), ())
    runner.is_skipping = True
    slices = (SequenceSlice(1, (5, 6), 0, (0,)), SequenceSlice(2, (7, 8), 0, (2,), spec))
    assert [drawn.token_id for drawn in runner.execute(Batch(prefill=slices))] == [None, 8]
    first, untouched, last = memory.bytes.reshape(3, -1)
    assert not untouched.any()
    assert (first.view("int16") != last.view("int16")).mean() > 0.95
    values = torch.from_numpy(first.copy()).view(torch.bfloat16).float()
    assert values.std() == pytest.approx(1.0, abs=0.05)
    assert runner.spent_s == 0


def test_only_batons_worker_gets_its_options() -> None:
    baton, *peers = programs(["llama"], "python", "--pool-tokens=5000", "--instruction-set=avx2")
    assert baton.arguments == ("--pool-tokens=5000", "--instruction-set=avx2")
    assert [(peer.engine, peer.arguments) for peer in peers] == [("llama", ())]


def test_kernels_in_the_package_were_built_ahead_and_others_at_first_use() -> None:
    package = Path(workers.__file__).parent
    maps = f"7f00-7f01 r-xp 00000000 08:01 1 {package}/kernels-avx2.so\n7f00-7f01 r-xp 0 08:01 1 /home/x/libc.so\n"
    assert library_origins(maps) == ["kernels built ahead"]
    assert library_origins("7f00-7f01 r-xp 0 08:01 1 /cache/kernels-avx2-0123.so") == ["kernels compiled at first use"]


def test_a_core_is_busy_only_as_long_as_wanted() -> None:
    before = children()
    with busy_core():
        (process,) = children() - before
        assert os.sched_getaffinity(process) == {max(os.sched_getaffinity(0))}
    assert children() == before


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_files_can_be_dropped_from_the_page_cache_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 5000)
    (tmp_path / "config.json").write_text("{}")
    files = weight_files(tmp_path)
    assert files == [tmp_path / "a.safetensors"]
    assert weight_files(files[0]) == files
    forget(files)
    assert read_once(files) > 0
    assert files[0].read_bytes() == b"x" * 5000


def test_a_cold_load_finds_compiled_kernels_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("kernels-avx2-12.so", "kernels-avx2-12.lock", "weights/34.packed"):
        (tmp_path / name).touch()
    keep_only_kernels(tmp_path)
    keep_only_kernels(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "kernels-avx2-12.lock",
        "kernels-avx2-12.so",
    ]


TASK = "baton::Pool::run<baton::Model<baton::Bf16>::{}(long)::{{lambda(long, int)#1}}>(long)::{{lambda(void*)#1}}::_FUN(void*)"
PERF = f"""7
    1a multiply_tile<baton::Bf16, 1>
    2b {TASK.format("forward")}
    3c baton_forward

7
    1a void baton::Model<baton::Bf16>::forward(baton::Step const&, void*)
    3c baton_forward

7
    4d _PyEval_EvalFrameDefault

8
    1a multiply_tile<baton::Bf16, 1>
    2b {TASK.format("add_product")}

8
    5e std::thread::_State_impl<baton::Pool::Pool(int)::{{lambda()#1}}>::_M_run()

9
    4d another_library
"""


def test_samples_are_sorted_by_the_task_that_a_thread_had() -> None:
    samples = list(Sample.parse(PERF))
    kinds = ["queries, keys, values", SERIAL, PYTHON, "output and down projections", WAITING, PYTHON]
    assert [sample.kind for sample in samples] == kinds
    stepping, helping = stepping_and_helping(samples, 7)
    assert shares(stepping) == {kind: pytest.approx(1 / 3) for kind in kinds[:3]}
    assert shares(helping) == {kind: 0.5 for kind in kinds[3:5]}
    assert shares([]) == {}
