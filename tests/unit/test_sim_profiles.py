"""Profiles: what published hardware and measured workers cost, and one sentence for whatever is wrong with them."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.sim.profiles.accelerators import ACCELERATORS, Efficiency, accelerator
from cluster.sim.profiles.files import load_profile, published_file, read_profile, require_model
from cluster.sim.profiles.fitted import FittedCost, MeasuredStep, Parts, PoorFit, fit
from cluster.sim.profiles.models import MODELS, WEIGHT_TYPES, Parameters, weight_type
from cluster.sim.profiles.published import USABLE_MEMORY, published_profile, weight_bytes
from cluster.sim.profiles.roofline import RooflineCost
from workers.config import ParallelConfig
from workers.errors import InvalidConfig

LAYOUTS = ("tp1", "tp2", "tp4", "ep2", "ep8", "ep8-tp2", "ep8-tp8", "ep16", "ep64", "ep24-r8")
STEPS = ((1, 1, 0, 0), (0, 0, 1, 64), (512, 131_328, 0, 0), (8192, 1 << 30, 64, 1 << 17), (0, 0, 256, 1 << 21))
IDEAL = Efficiency(
    memory=1, dense=1, experts=1, unpacking=1, attention=1, link=1, imbalance=1,
    step_s=0, layer_s=0, near_latency_s=0, far_latency_s=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "billions", "kv_bytes"),
    [("0.3B", 0.361, 18_432), ("21B-A3B", 21.825, 57_344), ("300B-A47B", 299.48, 221_184)],
)
def test_models_have_the_published_sizes(model: str, billions: float, kv_bytes: int) -> None:
    # Without the dense block for multi-token prediction, which makes 21.9 and 300.5 billion of the two mixtures.
    config, one = MODELS[model], Parameters.of(MODELS[model])
    experts = 0 if config.moe is None else one.num_mixtures * config.moe.num_experts * one.expert
    tables = one.table * (1 if config.tie_word_embeddings else 2)
    total = one.attention + one.dense + one.shared + experts + one.router + tables + one.norms
    assert total / 1e9 == pytest.approx(billions, abs=0.01)
    hardware = "h200" if model != "300B-A47B" else "h200:300B-A47B:bf16:ep8"
    profile = published_profile(hardware if ":" in hardware else f"{hardware}:{model}")
    assert profile.kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 1.6), (64, 11.9), (256, 17.0)])
def test_an_ideal_h200_decodes_as_fast_as_its_memory_allows(batch: int, milliseconds: float) -> None:
    # Worked out by hand for 21B-A3B in bf16 at 4.3 TB/s: [weights common to all, experts hit, KV of 2,048 tokens] / rate.
    hardware = replace(accelerator("h200"), memory_bytes_per_s=4.3e12)
    cost = RooflineCost(hardware, MODELS["21B-A3B"], weight_type("bf16"), ParallelConfig(), IDEAL)
    assert cost.step_s(0, 0, batch, batch * 2048) * 1000 == pytest.approx(milliseconds, rel=0.04)


def test_every_combination_fits_and_is_monotone_or_is_refused_in_one_sentence() -> None:
    made = refused = 0
    for hardware, model, dtype, layout in itertools.product(ACCELERATORS, MODELS, WEIGHT_TYPES, LAYOUTS):
        name = f"{hardware.name}:{model}:{dtype}:{layout}"
        try:
            profile = published_profile(name)
        except InvalidConfig as error:
            assert "\n" not in str(error) and (layout in str(error) or name in str(error))
            refused += 1
            continue
        made += 1
        cost = profile.cost
        assert isinstance(cost, RooflineCost)
        parallel = cost.parallel
        kv = profile.num_blocks * profile.block_size * profile.kv_bytes_per_token / parallel.size
        taken = weight_bytes(cost.config, cost.weights, parallel)
        assert 0 < kv + taken < USABLE_MEMORY * hardware.memory_bytes
        for step in STEPS:
            seconds = profile.step_s(*step)
            assert 0 < seconds < 3600
            for place in range(4):
                more = list(step)
                more[place] = more[place] * 2 + 1
                assert profile.step_s(*more) >= seconds, (name, step, place)
    assert made > 100 and refused > 50


def test_what_a_model_needs_is_refused_with_the_reason() -> None:
    for name, words in (
        ("h200:300B-A47B:bf16:tp1", "does not fit: weights take 599"),
        ("h200:21B-A3B:bf16:tp8", "must divide expert_parallel"),
        ("h200:0.3B:bf16:ep2", "this model is dense"),
        ("h200:21B-A3B:bf16:pp2", "must look like tp1"),
        ("a100:21B-A3B", "'a100' has no published profile"),
        ("h200:7B", "'7B' has no published profile"),
        ("h200:0.3B:int3", "'int3' has no published profile"),
        ("h200", "neither a file nor a name"),
    ):
        with pytest.raises(InvalidConfig, match=words):
            load_profile(name)


def test_more_ranks_pay_for_exchanges_and_less_for_experts() -> None:
    one, eight, sixteen = (published_profile(f"h200:21B-A3B:bf16:{layout}") for layout in ("tp1", "ep8", "ep16"))
    batch = (0, 0, 256, 256 * 1024)
    assert eight.step_s(*batch) < one.step_s(*batch)
    # A lone token reads as many experts everywhere, and pays for latencies that grow when the group leaves its node.
    assert sixteen.step_s(0, 0, 1, 64) > eight.step_s(0, 0, 1, 64)
    assert eight.transfer_bytes_per_s == 8 * one.transfer_bytes_per_s


def test_smaller_weights_decode_faster_and_leave_more_room() -> None:
    bf16, wint8, wint4, fp8 = (published_profile(f"h200:21B-A3B:{d}") for d in ("bf16", "wint8", "wint4", "fp8"))
    batch = (0, 0, 32, 32 * 1024)
    assert wint4.step_s(*batch) < wint8.step_s(*batch) < bf16.step_s(*batch)
    assert wint4.num_blocks > wint8.num_blocks > bf16.num_blocks
    prompt = (8192, 8192 * 4096, 0, 0)
    assert fp8.step_s(*prompt) < bf16.step_s(*prompt) < wint8.step_s(*prompt)


def test_a_published_profile_is_the_same_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    document = published_file("b200:21B-A3B:fp8:ep4")
    path.write_text(json.dumps(document))
    assert load_profile(str(path)) == published_profile("b200:21B-A3B:fp8:ep4")
    document["efficiency"]["memory"] = 0.425
    slower = read_profile(document, "it")
    assert slower.step_s(0, 0, 1, 64) > load_profile(str(path)).step_s(0, 0, 1, 64)


def fitted_document() -> dict[str, Any]:
    return {
        "format": "baton-profile-1",
        "kind": "fitted",
        "name": "here",
        "model": "ernie-4.5-tiny",
        "parts": {"step_s": 0.001, "decode_s": 0.0002, "prefill_token_s": 0.0001},
        "kv_bytes_per_token": 2048,
        "num_blocks": 256,
        "max_batched_tokens": 512,
        "max_num_seqs": 64,
        "max_model_len": 8192,
        "transfer_latency_s": 0.001,
        "transfer_bytes_per_s": 1_000_000_000,
        "router_s": 0.001,
        "control_latency_s": 0.001,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, '"format" must be'),
        ({"kind": "guessed"}, "roofline or fitted; it is 'guessed'"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"num_blocks": 1}, "must hold a request of max_model_len"),
        ({"parts": {"decode_s": -1}}, "parts.decode_s must be at least 0"),
        ({"parts": {"decode_s": "fast"}}, "parts.decode_s must be a number"),
        ({"parts": {"decodes_s": 1}}, "did you mean"),
        ({"router_s": None}, "router_s"),
    ],
)
def test_a_broken_file_is_refused_by_field(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(fitted_document()))
    assert load_profile(str(path)).step_s(100, 5000, 2, 300) == pytest.approx(0.001 + 0.0004 + 0.01)
    path.write_text(json.dumps(fitted_document() | change))
    with pytest.raises(InvalidConfig) as refused:
        load_profile(str(path))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_no_json_and_a_profile_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{")
    with pytest.raises(InvalidConfig, match="cannot be read as JSON"):
        load_profile(str(path))
    profile = read_profile(fitted_document(), "it")
    require_model(profile, "models/ernie-4.5-tiny")
    require_model(published_profile("h200:21B-A3B"), "ERNIE-4.5-21B-A3B")
    with pytest.raises(InvalidConfig, match=r"is for model ernie-4\.5-tiny, not for 21B-A3B"):
        require_model(profile, "21B-A3B")


PLANTED = Parts(step_s=2e-4, prefill_step_s=1e-4, prefill_token_s=3e-5, prefill_attended_s=2e-8, decode_s=8e-5,
                decode_attended_s=3e-8, experts_s=1e-3, chosen_share=0.25)  # fmt: skip


def measured(noise: float, seed: int = 0) -> list[MeasuredStep]:
    rng, cost, steps = random.Random(seed), FittedCost(PLANTED), []
    for tokens, context in itertools.product((1, 16, 64, 256, 512), (0, 1024, 4096)):
        steps.append((tokens, tokens * context + tokens * (tokens + 1) // 2, 0, 0))
    for batch, context in itertools.product((1, 2, 4, 8, 16, 32, 64), (64, 1024, 4096)):
        steps.append((0, 0, batch, batch * context))
    steps.append((256, 40_000, 16, 16 * 1024))
    return [MeasuredStep(*s, cost.step_s(*s) * (1 + noise * (rng.random() - 0.5))) for s in steps]


def test_a_fit_finds_what_steps_are_made_of() -> None:
    found = fit(measured(noise=0.0), PLANTED.chosen_share)
    assert found.large_error < 1e-6
    noisy = fit(measured(noise=0.1), PLANTED.chosen_share)
    assert 0 < noisy.typical_error < 0.06
    for step in measured(noise=0.0, seed=1):
        counts = (step.prefill_tokens, step.prefill_attended, step.num_decodes, step.decode_attended)
        assert noisy.cost.step_s(*counts) == pytest.approx(step.seconds, rel=0.15)


def test_a_poor_fit_is_refused_with_a_word() -> None:
    with pytest.raises(PoorFit, match="do not follow a sum of parts"):
        fit(measured(noise=1.9), PLANTED.chosen_share)
    with pytest.raises(PoorFit, match="at least 8 measured steps"):
        fit(measured(noise=0.0)[:5])


def test_no_part_is_ever_below_zero() -> None:
    # Longer contexts that look faster would give a negative part without the bound.
    steps = [replace(s, seconds=s.seconds * (0.97 if s.decode_attended > 40_000 else 1)) for s in measured(noise=0.02)]
    parts = fit(steps, PLANTED.chosen_share).cost.parts
    assert all(getattr(parts, name) >= 0 for name in parts.__slots__)
