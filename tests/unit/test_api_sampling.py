"""What a client asks for reaches the engine unchanged, and what it leaves open is filled in as promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_backend import CHECKPOINT, MESSAGES, MODEL, Api

from router.config import ApiConfig
from router.sampling_defaults import load_sampling_defaults
from workers.errors import InvalidConfig
from workers.request import INT64_MAX, INT64_MIN, SamplingParams

DEFAULTS = SamplingParams(
    temperature=0.8,
    top_p=0.7,
    top_k=9,
    repetition_penalty=1.1,
    stop=("END",),
    logit_bias=((4, 1.0),),
    bad_words=((8, 9),),
)
API_CONFIG = ApiConfig(sampling_defaults=DEFAULTS)


def complete(api: Api, **fields: Any) -> Any:
    return api.client.completions.create(**{"model": MODEL.name, "prompt": "Hi", **fields})


def chat(api: Api, **fields: Any) -> Any:
    return api.client.chat.completions.create(**{"model": MODEL.name, "messages": MESSAGES, **fields})


def params(api: Api, **fields: Any) -> SamplingParams:
    response = api.http.post("/v1/completions", json={"prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    return api.backend.requests[-1].params


def test_every_sampling_field_reaches_the_engine(api: Api) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 2,
        "seed": 11,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    lists: dict[str, Any] = {"stop_token_ids": [7], "logit_bias": {"5": -3}, "stop": "x", "bad_words": []}
    asked = params(api, **fields, include_stop_str_in_output=True, **lists)
    assert asked == SamplingParams(
        **fields, include_stop=True, stop=("x",), stop_token_ids=(7,), logit_bias=((5, -3.0),), logprobs=None
    )


def test_what_a_client_leaves_open_or_null_comes_from_the_checkpoints_defaults(api: Api) -> None:
    asked = params(api, temperature=None)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.repetition_penalty) == (0.8, 0.7, 9, 1.1)
    assert (asked.stop, asked.logit_bias, asked.bad_words) == (("END",), ((4, 1.0),), ((8, 9),))
    assert params(api, top_p=1, temperature=0).top_p == 1
    own = params(api, stop=[], logit_bias={}, bad_words=[[3]])
    assert (own.stop, own.logit_bias, own.bad_words) == ((), (), ((3,),))


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    assert load_sampling_defaults(tmp_path) == SamplingParams()
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.8, "top_p": 0.8, "top_k": -1}))
    assert load_sampling_defaults(tmp_path) == SamplingParams(temperature=0.8, top_p=0.8)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    assert load_sampling_defaults(tmp_path).temperature == 0
    (tmp_path / "generation_config.json").write_text('{"temperature": 7}')
    with pytest.raises(InvalidConfig, match="temperature"):
        load_sampling_defaults(tmp_path)
    assert load_sampling_defaults(CHECKPOINT).temperature == 0


def test_top_p_0_leaves_the_likeliest_token(api: Api) -> None:
    for given in ({"top_p": 0}, {"top_p": 0.0, "top_k": 5}):
        drawn = params(api, **given, temperature=1)
        assert (drawn.top_p, drawn.top_k) == (1.0, 1)


def test_top_k_minus_1_means_off(api: Api) -> None:
    assert params(api, top_k=-1).top_k == 0


def test_seeds_are_all_of_int64(api: Api) -> None:
    assert params(api, seed=INT64_MAX).seed == INT64_MAX and params(api, seed=INT64_MIN).seed == INT64_MIN


def test_without_a_seed_one_is_drawn_for_all_choices_of_a_request(api: Api) -> None:
    complete(api, n=3, prompt=["a", "b"])
    complete(api)
    seeds = [request.params.seed for request in api.backend.requests]
    assert len(set(seeds[:6])) == 1 and seeds[6] != seeds[0] and seeds[0] is not None


def test_n_choices_with_a_seed_differ_and_come_again(api: Api) -> None:
    first, again = (
        [choice.message.content for choice in chat(api, n=3, seed=42, max_tokens=20).choices] for _ in range(2)
    )
    assert len(set(first)) == 3 and first == again


def test_choices_are_prompt_major_and_count_within_their_prompt(api: Api) -> None:
    answer = complete(api, prompt=["one", "two"], n=2, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    tokenizer = api.backend.tokenizer
    assert [(tokenizer.decode(request.prompt_token_ids), request.choice_index) for request in api.backend.requests] == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]
    alone = complete(api, prompt="two", n=2, seed=1)
    assert [choice.text for choice in alone.choices] == [choice.text for choice in answer.choices[2:]]


def test_a_prompt_in_any_of_its_four_forms_says_the_same(api: Api) -> None:
    token_ids = api.backend.tokenizer.encode("Hi")
    said = {complete(api, prompt=prompt, seed=3).choices[0].text for prompt in ("Hi", ["Hi"], token_ids, [token_ids])}
    assert len(said) == 1


def test_a_conversation_is_rendered_by_the_checkpoints_template(api: Api) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(api, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    text = api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)
    assert text == "<|begin_of_sentence|>Be brief.\nUser: one\ntwo\nAssistant: "


def test_the_generation_prompt_can_be_left_out(api: Api) -> None:
    chat(api, extra_body={"add_generation_prompt": False, "chat_template_kwargs": {"enable_thinking": False}})
    assert api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids).endswith("User: Hi\n")


def test_length_defaults_to_16_for_completions_and_to_what_fits_for_chat(api: Api) -> None:
    complete(api)
    complete(api, prompt=[300] * (MODEL.max_model_len - 5))
    chat(api)
    lengths = [request.params.max_tokens for request in api.backend.requests]
    assert lengths == [16, 5, MODEL.max_model_len - len(api.backend.requests[-1].prompt_token_ids)]


def test_max_tokens_and_max_completion_tokens_both_bound_a_chat(api: Api) -> None:
    assert chat(api, max_tokens=3).usage.completion_tokens == 3
    assert chat(api, max_completion_tokens=4).usage.completion_tokens == 4
    assert chat(api, max_tokens=3, max_completion_tokens=4).usage.completion_tokens == 4


def test_stop_takes_any_number_of_strings(api: Api) -> None:
    many = [f"stop {number}" for number in range(40)]
    assert params(api, stop=many).stop == tuple(many)
    assert params(api, stop="x").stop == ("x",) and params(api, stop=None).stop == DEFAULTS.stop


def test_bad_words_are_tokenized_with_and_without_a_blank_or_taken_as_ids(api: Api) -> None:
    encode = api.backend.tokenizer.encode
    words = params(api, bad_words=["day", "the very day", [5, 6]]).bad_words
    assert words == tuple(
        map(tuple, (encode("day"), encode(" day"), encode("the very day"), encode(" the very day"), [5, 6]))
    )
    assert any(len(word) > 1 for word in words)


def test_priority_reaches_the_engine(api: Api) -> None:
    complete(api, extra_body={"priority": -5})
    assert api.backend.requests[-1].priority == -5


def test_usage_is_exact_and_counts_a_prompt_once_however_many_choices(api: Api) -> None:
    api.backend.cached_tokens = 1
    usage = complete(api, prompt=["a day", "a"], n=3, max_tokens=7).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 42, 45)
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_cached_tokens_are_0_when_cold(api: Api) -> None:
    assert chat(api).usage.prompt_tokens_details.cached_tokens == 0


def test_token_ids_come_back_when_asked_for_whole_and_streamed(api: Api) -> None:
    ask: dict[str, Any] = {"seed": 5, "max_tokens": 9, "extra_body": {"return_token_ids": True}}
    whole = complete(api, **ask).choices[0]
    assert api.backend.tokenizer.decode(whole.token_ids) == whole.text and len(whole.token_ids) == 9
    assert whole.prompt_token_ids == api.backend.tokenizer.encode("Hi")
    chunks = list(complete(api, stream=True, **ask))
    assert [token_id for chunk in chunks for token_id in chunk.choices[0].token_ids] == whole.token_ids
    assert chunks[0].choices[0].prompt_token_ids == whole.prompt_token_ids
    answer = chat(api, **ask)
    assert len(answer.choices[0].token_ids) == 9 and len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    streamed = list(chat(api, stream=True, **ask))
    assert [token_id for chunk in streamed for token_id in chunk.choices[0].token_ids] == answer.choices[0].token_ids
    assert streamed[0].prompt_token_ids == answer.prompt_token_ids
