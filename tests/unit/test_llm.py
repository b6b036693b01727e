"""Offline generation with the shipped model."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.llm import LLM, BeamSearchParams, SamplingParams
from workers.config import ParallelConfig
from workers.errors import InvalidConfig, InvalidRequest

MODEL = Path(__file__).resolve().parents[2] / "models" / "ernie-4.5-tiny"
GREEDY = SamplingParams(max_tokens=12, temperature=0)
WHO = "<|begin_of_sentence|>User: Who are you?\nAssistant: "


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(MODEL), kv_memory_bytes=64_000_000, max_logprobs=2048)


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


@pytest.mark.parametrize(
    ("width", "max_tokens", "length_penalty", "early_stopping"),
    [(2, 16, 1.0, False), (4, 12, 0.0, "never"), (4, 20, 2.0, False), (3, 12, -0.5, True), (6, 8, 1.0, "never")],
)
def test_beams_are_those_of_transformers(
    llm: LLM, width: int, max_tokens: int, length_penalty: float, early_stopping: bool | Literal["never"]
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    prompts = [llm.tokenizer.encode(text) for text in (WHO, "<|begin_of_sentence|>User: Tell me a", "One list")]
    params = BeamSearchParams(width, max_tokens, length_penalty=length_penalty, early_stopping=early_stopping)
    for prompt, found in zip(prompts, llm.beam_search(prompts, params, progress=False), strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=max_tokens, do_sample=False,
            length_penalty=length_penalty, early_stopping=early_stopping, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        for beam, sequence, score in zip(
            found.outputs, wanted.sequences, wanted.sequences_scores.tolist(), strict=True
        ):
            assert sequence[len(prompt) :].tolist()[: len(beam.token_ids)] == beam.token_ids
            assert beam.cumulative_logprob == pytest.approx(score * len(beam.token_ids) ** length_penalty, abs=1e-3)
            assert beam.text == llm.tokenizer.decode(beam.token_ids, skip_special_tokens=True)


def test_logprobs_may_be_those_of_all_tokens_or_of_some_that_are_named(llm: LLM) -> None:
    every = SamplingParams(max_tokens=3, temperature=1.0, seed=3, logprobs=-1, prompt_logprobs=-1)
    (whole,) = llm.generate("One list of", every, progress=False)
    (score, *_), prompt_score = whole.outputs[0].logprobs, (whole.prompt_logprobs or [])[1]
    assert prompt_score is not None
    for top in (score.top, prompt_score.top):
        assert {token for token, _ in top} == set(range(llm.tokenizer.vocab_size))
        assert math.fsum(math.exp(logprob) for _, logprob in top) == pytest.approx(1, abs=1e-4)
        assert all(one >= other for (_, one), (_, other) in pairwise(top))
    ids = (900, 4, 20)
    named = SamplingParams(max_tokens=3, temperature=1.0, seed=3, logprobs=0, logprob_token_ids=ids)
    (some,) = llm.generate("One list of", named, progress=False)
    assert some.outputs[0].token_ids == whole.outputs[0].token_ids
    for own, of_all in zip(some.outputs[0].logprobs, whole.outputs[0].logprobs, strict=True):
        assert own.top == tuple(entry for entry in of_all.top if entry[0] in ids)
    with pytest.raises(InvalidRequest, match="between 0 and 2048"):
        llm.generate("One", SamplingParams(logprobs=2049), progress=False)
    with pytest.raises(InvalidRequest, match="logprob_token_ids needs token ids"):
        llm.generate("One", SamplingParams(logprob_token_ids=(1408,)), progress=False)


def test_an_answer_may_be_bound_to_a_form(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    forms: list[dict[str, Any]] = [
        {"structured_outputs": {"json": schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"structured_outputs": {"regex": r"\{\"a\": [12]\}"}},
    ]
    each = [SamplingParams(max_tokens=60, temperature=1.0, seed=seed, **form) for seed in range(2) for form in forms]
    together = llm.generate(["How much is 17 + 25?"] * len(each), each, progress=False)
    for params, generation in zip(each, together, strict=True):
        (choice,) = generation.outputs
        assert choice.finish_reason == "stop" and json.loads(choice.text)["a"] in (1, 2)
        assert llm.generate("How much is 17 + 25?", params, progress=False)[0].outputs == [choice]
    with pytest.raises(InvalidRequest, match="unclosed group"):
        llm.generate("x", SamplingParams(structured_outputs={"regex": "("}), progress=False)


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
    with pytest.raises(InvalidRequest, match="2 prompts need one SamplingParams or as many"):
        llm.generate(["a", "b"], [GREEDY], progress=False)
    with pytest.raises(InvalidConfig):
        LLM("no/such/folder")


def test_parameters_may_be_spelled_as_over_http(llm: LLM) -> None:
    def text(**params: Any) -> str:
        (generation,) = llm.generate(
            WHO, SamplingParams(**{"max_tokens": 24, "temperature": 0, **params}), progress=False
        )
        return generation.outputs[0].text

    whole = text()
    assert "small" in whole and " am" in whole
    assert text(stop="small") == text(stop=["small"]) == whole.partition("small")[0]
    banned = llm.tokenizer.encode(whole)[0]
    assert text(logit_bias={banned: -100.0}) == text(logit_bias=((banned, -100.0),)) != whole
    assert "Baton" in whole and "Baton" not in text(bad_words=["Baton"])
    assert len(llm.tokenizer.encode(text(max_tokens=None, ignore_eos=True))) <= 16
    assert llm.generate([], GREEDY, progress=False) == []
    by_iterator = llm.generate((prompt for prompt in (WHO, [5, 6, 7])), GREEDY, progress=False)  # type: ignore[misc]
    assert by_iterator[0].outputs[0].text == whole[: len(by_iterator[0].outputs[0].text)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["5"]),
        ("logit_bias", 5),
        ("logit_bias", ((5, 1.0), (5, 2.0))),
        ("logit_bias", {5: "1"}),
        ("bad_words", "x"),
        ("max_tokens", "16"),
        ("max_tokens", 0),
        ("temperature", "hot"),
        ("ignore_eos", 1),
        ("top_p", 2.0),
    ],
)
def test_a_parameter_of_a_wrong_type_is_named_before_anything_runs(llm: LLM, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        llm.generate(WHO, SamplingParams(**{field: value}), progress=False)
    assert caught.value.param == field
    assert not llm._engine.has_work


@pytest.mark.parametrize("prompts", [{"prompt": "hi"}, [{"prompt": "hi"}], 5, [None], [[5, "x"]], [[10**9]], ""])
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        llm.generate(prompts, GREEDY, progress=False)
    for n in (0, -1):
        with pytest.raises(InvalidRequest, match="n must"):
            llm.generate(WHO, GREEDY, n=n, progress=False)


def test_a_conversation_is_read_by_the_rules_of_the_http_api(llm: LLM) -> None:
    def ids(*messages: Any) -> list[int]:
        return llm.chat(list(messages), SamplingParams(max_tokens=1), progress=False)[0].prompt_token_ids

    user = {"role": "user", "content": "hi"}
    assert ids({"role": "developer", "content": "RULES"}, user) == ids({"role": "system", "content": "RULES"}, user)
    assert "RULES" in llm.tokenizer.decode(ids({"role": "developer", "content": "RULES"}, user))
    parts = [{"type": "text", "text": "hi"}]
    assert ids({"role": "user", "content": parts}) == ids(user)
    for bad in (
        {"role": "tool", "content": "42"},
        {"role": "system"},
        {"role": "user", "content": [{"type": "image"}]},
    ):
        with pytest.raises(InvalidRequest, match="messages"):
            ids(bad, user)
    for bad in ("hi", [], user):
        with pytest.raises(InvalidRequest, match="messages"):
            llm.chat([[user], bad], GREEDY, progress=False)  # type: ignore[list-item]


def test_threads_take_turns_and_each_gets_what_it_would_have_got_alone(llm: LLM) -> None:
    prompts = [f"What is {number} + 5?" for number in range(10, 18)]
    alone = [llm.generate(prompt, GREEDY, progress=False)[0].outputs[0].token_ids for prompt in prompts]
    begin = threading.Barrier(len(prompts))

    def one(prompt: str) -> list[list[int]]:
        begin.wait(60)
        return [llm.generate(prompt, GREEDY, progress=False)[0].outputs[0].token_ids for _ in range(2)]

    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(one, prompts, timeout=120)) == [[ids, ids] for ids in alone]
    assert llm._engine.num_held_blocks == 0


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM) -> None:
    expected = llm.generate(WHO, GREEDY, progress=False)[0].outputs[0].token_ids
    done = threading.Event()

    def interrupt_once_it_runs() -> None:
        while not done.is_set():
            if llm._engine.num_held_blocks:
                os.kill(os.getpid(), signal.SIGINT)
                return

    interrupter = threading.Thread(target=interrupt_once_it_runs)
    interrupter.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([WHO] * 4, SamplingParams(max_tokens=2000, ignore_eos=True), progress=False)
    finally:
        done.set()
        interrupter.join()
        signal.signal(signal.SIGINT, before)
    assert llm.generate(WHO, GREEDY, progress=False)[0].outputs[0].token_ids == expected
    assert llm._engine.num_held_blocks == 0 and not llm._engine.has_work


def test_a_model_over_several_ranks_is_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidConfig, match="needs `baton serve`"):
        LLM(str(MODEL), parallel=ParallelConfig(expert_parallel=2))
