"""Measuring a worker for the simulator: kinds of steps, contexts that were never computed, overheads of real processes, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.sim.measuring.overheads import HANDOFF_HOPS, ROUTER_HOPS, _made_of, measure_overheads
from cluster.sim.measuring.serving import ServedPrompt, ServedStep, ServedTimes, measure_serving, with_serving
from cluster.sim.measuring.skipping import SkippingRunner
from cluster.sim.measuring.steps import StepKind, StepMeter, step_kinds, undisturbed
from cluster.sim.measuring.worker_process import FakeModel
from cluster.sim.profiles.files import load_profile
from cluster.sim.profiles.fitted import FittedCost, MeasuredStep, Parts
from workers.config import WorkerConfig
from workers.engine.fake_runner import FakeRunner
from workers.kv_memory.memory import KvLayout
from workers.runner import Batch
from workers.text.tokenizer import Tokenizer

MODEL = "models/ernie-4.5-tiny"
LAYOUT = KvLayout(num_blocks=512, num_layers=2, num_kv_heads=1, block_size=64, head_dim=16, dtype="float32", itemsize=4)


class Watched(FakeRunner):
    """Keeps the shapes of the batches that were really computed: tokens and contexts of prompts, contexts of decodes."""

    shapes: list[tuple[list[tuple[int, int]], list[int]]]

    def execute(self, batch: Batch, on_layer: Any = None) -> Any:
        self.shapes.append(
            ([(len(piece.token_ids), piece.start) for piece in batch.prefill], [piece.start for piece in batch.decode])
        )
        return super().execute(batch)


def test_each_kind_of_step_is_computed_as_it_is_named_and_leaves_nothing() -> None:
    config = WorkerConfig(MODEL, prefix_cache=False, max_num_seqs=16, max_batch_tokens=256)
    model = FakeModel(Tokenizer.load(MODEL), LAYOUT, 8192, 1000)
    watched = Watched(model.runner.kv_memory, 1000)
    watched.shapes = []
    runner = model.runner = SkippingRunner(watched)  # type: ignore[assignment]
    meter = StepMeter(config, model, runner)
    kinds = step_kinds(config, 4096, LAYOUT.num_blocks)
    assert any(kind.prefill_context for kind in kinds) and any(
        kind.prefill_tokens and kind.num_decodes for kind in kinds
    )
    for kind in kinds:
        watched.shapes.clear()
        step = meter.measure(kind)
        assert step.seconds > 0 and meter.num_held_blocks == 0, kind
        assert (step.prefill_tokens, step.num_decodes) == (kind.prefill_tokens, kind.num_decodes)
        prompts, decodes = watched.shapes[-1]
        assert prompts == ([(kind.prefill_tokens, kind.prefill_context)] if kind.prefill_tokens else [])
        assert len(decodes) == kind.num_decodes
        # Sequences that began first have grown a little while the others were put in place.
        assert sum(decodes) == pytest.approx(step.decode_attended, rel=0.1, abs=kind.num_decodes * 8)
        assert len(watched.shapes) <= 6, "no context was computed"
    meter.close()


def test_other_programs_only_make_steps_longer() -> None:
    def step(seconds: float) -> MeasuredStep:
        return MeasuredStep(1, 1, 0, 0, seconds)

    rounds = [[step(a), step(b)] for a, b in ((9, 1.1), (1.2, 8), (1.0, 1.0), (1.1, 7), (8, 9))]
    assert [kind.seconds for kind in undisturbed(rounds)] == [1.1, 1.1]
    assert undisturbed([[step(3.0)]]) == (step(3.0),)


def test_a_handoff_is_hops_and_bytes() -> None:
    lengths, token_bytes, hop, rate = [64, 6400], 1000, 0.001, 1e9
    here = [0.004, 0.010]
    over = [base + HANDOFF_HOPS * hop + length * token_bytes / rate for base, length in zip(here, lengths, strict=True)]
    found = _made_of(lengths, here, over, token_bytes, "shm")
    assert found.router_s == pytest.approx(0.004 / ROUTER_HOPS)
    assert found.control_latency_s == pytest.approx(hop) and found.transfer_latency_s == pytest.approx(hop)
    assert found.transfer_bytes_per_s == pytest.approx(rate)
    assert found.router_token_s == pytest.approx(0.006 / 6336)
    noisy = _made_of(lengths, here, [0.009, 0.009], token_bytes, "shm")
    assert noisy.control_latency_s > 0 and noisy.transfer_bytes_per_s > 0


def test_overheads_come_from_real_processes() -> None:
    found = measure_overheads(MODEL, replace(LAYOUT), 2048, 1000, 2, lambda text: None)
    assert found.transport == "shm" and 0 < found.router_s < 5 and 0 < found.control_latency_s < 5
    assert found.transfer_bytes_per_s > 1e3 and 0 <= found.connect_s < 5
    assert [length for length, _, _ in found.samples] == [64, 496, 992, 1984]


def test_a_published_profile_is_written_to_be_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", "--published", "h200:21B-A3B:fp8:tp1", "--out", str(out)]) == 0
    assert load_profile(str(out)).name == "h200:21B-A3B:fp8:tp1"
    assert main(["profile", "--published", "h200:0.3B"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "0.3B"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--published", "h200:300B-A47B"], "does not fit"),
        (["--rounds", "0"], "--rounds must be from 1 to 1000"),
        (["--beside", "-1"], "--beside must be from 0 to 64"),
        (["--model", "nowhere"], "nowhere"),
        (["--out", "no/such/folder/f.json"], "names a folder that does not exist"),
        (["--published", "h200:0.3B", "--out", "no/such/folder/f.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_kinds_fit_the_pool() -> None:
    config = WorkerConfig(MODEL, max_num_seqs=8)
    for num_blocks in (24, 64, 4096):
        kinds = step_kinds(config, 8192, num_blocks)
        assert all(kind.room_tokens(512) <= num_blocks * 64 for kind in kinds)
        assert max((kind.num_decodes for kind in kinds), default=0) <= 8
    assert StepKind(num_decodes=4, decode_context=512).num_skips(512) == 4


def test_what_serving_adds_is_a_line_that_makes_nothing_cheaper() -> None:
    cost = FittedCost(Parts(decode_step_s=1e-3, decode_s=1e-4, prefill_token_s=1e-5))
    decodes = tuple(
        ServedStep(batch, cost.step_s(0, 0, batch, 0) + 3e-4 + batch * 2e-5, cost.step_s(0, 0, batch, 0))
        for batch in (1, 4, 16)
    )
    prompts = tuple(ServedPrompt(n, -(-n // 512), 1 + -(-n // 512) * 2e-3 + n * 1e-6, 1.0) for n in (128, 512, 1024))
    parts = with_serving(cost, ServedTimes(decodes, prompts)).parts
    assert parts.decode_step_s == pytest.approx(1.3e-3) and parts.decode_s == pytest.approx(1.2e-4)
    assert parts.prefill_step_s == pytest.approx(2e-3) and parts.prefill_token_s == pytest.approx(1.1e-5)
    assert with_serving(cost, ServedTimes()) == cost
    faster = tuple(replace(each, served_s=each.engine_s / 2) for each in decodes)
    sooner = tuple(replace(each, served_s=each.expected_s / 2) for each in prompts)
    assert with_serving(cost, ServedTimes(faster, sooner)) == cost


def test_real_workers_are_measured_as_a_router_sees_them() -> None:
    cost = FittedCost(Parts(step_s=1e-6))
    config = WorkerConfig(MODEL, max_num_seqs=4, max_batch_tokens=64, kv_memory_bytes=64 << 20)
    found = measure_serving(config, cost, 0.0, 1000)
    assert [each.num_decodes for each in found.decodes] == [1, 2, 4]
    assert all(0 < each.engine_s < each.served_s < 10 for each in found.decodes)
    assert [(each.num_tokens, each.num_steps) for each in found.prompts] == [
        (16, 1),
        (32, 1),
        (64, 1),
        (128, 2),
        (192, 3),
    ]
    assert all(each.expected_s < each.served_s < 10 for each in found.prompts)
