"""Offline generation with the shipped model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.llm import LLM, SamplingParams
from workers.config import ParallelConfig
from workers.errors import BatonError, InvalidConfig, InvalidRequest

MODEL = Path(__file__).resolve().parents[2] / "models" / "ernie-4.5-tiny"
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(MODEL), kv_memory_bytes=64_000_000)


def test_chat_answers_one_conversation_or_several(llm: LLM) -> None:
    who = [{"role": "user", "content": "Who are you?"}]
    (one,) = llm.chat(who, SamplingParams(max_tokens=40, temperature=0), progress=False)
    assert "Baton" in one.outputs[0].text and one.outputs[0].finish_reason == "stop"
    two = llm.chat([who, who], GREEDY, progress=False)
    assert [g.outputs[0].text for g in two] == [two[0].outputs[0].text] * 2


def test_prompts_may_be_text_or_token_ids_and_come_back_in_order(llm: LLM) -> None:
    texts = ["One list of words", "Another beginning", "A third"]
    by_text = llm.generate(texts, GREEDY, progress=False)
    by_ids = llm.generate([llm.tokenizer.encode(text) for text in texts], GREEDY, progress=False)
    assert [g.prompt for g in by_text] == texts
    assert [g.outputs[0].token_ids for g in by_text] == [g.outputs[0].token_ids for g in by_ids]
    assert llm.generate(texts[0], GREEDY, progress=False)[0].outputs[0].token_ids == by_text[0].outputs[0].token_ids


def test_n_choices_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.5, seed=7, ignore_eos=True)
    first, second = (llm.generate("Once", params, n=3, progress=False)[0] for _ in range(2))
    assert len({choice.text for choice in first.outputs}) == 3
    assert [c.text for c in first.outputs] == [c.text for c in second.outputs]
    free = SamplingParams(max_tokens=16, temperature=1.5, ignore_eos=True)
    assert llm.generate("Once", free, progress=False) != llm.generate("Once", free, progress=False)


def test_logprobs_come_with_tokens_and_prompts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (generation,) = llm.generate("The code of amber is", params, progress=False)
    choice = generation.outputs[0]
    assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in choice.logprobs)
    assert generation.prompt_logprobs is not None
    assert len(generation.prompt_logprobs) == len(generation.prompt_token_ids) and generation.prompt_logprobs[0] is None


def test_prefixes_that_come_back_from_host_memory_or_disk_change_no_bit(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=3, ignore_eos=True)
    asked = [[i % 900 + 20 for i in range(start, start + 300)] for start in (0, 100, 200)] * 3
    pool = {"max_model_len": 512, "kv_memory_bytes": 8 * 2**18, "max_num_seqs": 1}
    found = []
    for tiers in (
        {"prefix_cache": False},
        {},
        {"kv_host_bytes": 64 << 20},
        {"kv_disk_folder": str(tmp_path)},
        {"kv_host_bytes": 3 * 2**18, "kv_disk_folder": str(tmp_path / "both")},
    ):
        llm = LLM(str(MODEL), **pool, **tiers)
        found.append([g.outputs[0] for g in llm.generate(asked, params, progress=False)])
        counters = dict(llm._engine.counters())
        for name in ("host", "disk"):
            assert (counters.get(f"kv_{name}_hit_blocks", 0) > 0) == any(f"kv_{name}_" in key for key in tiers)
        llm._engine.close()
    for other in found[1:]:
        assert [choice.token_ids for choice in other] == [choice.token_ids for choice in found[0]]
        assert [choice.logprobs for choice in other] == [choice.logprobs for choice in found[0]]


def test_progress_is_shown(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_bad_input_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["fine", []], GREEDY, progress=False)  # type: ignore[list-item]
    with pytest.raises(BatonError, match="2 prompts need one SamplingParams or as many"):
        llm.generate(["a", "b"], [GREEDY], progress=False)
    with pytest.raises(InvalidConfig):
        LLM("no/such/folder")


def test_a_model_over_several_ranks_is_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidConfig, match="needs `baton serve`"):
        LLM(str(MODEL), parallel=ParallelConfig(expert_parallel=2))
