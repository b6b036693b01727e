"""Structured output and enforced calls over HTTP, before a fake that draws at random what the request's grammar allows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any, Literal

import jsonschema
import openai
import pytest
from byte_tokens import vocabulary
from fake_backend import MODEL, Api, error_of
from llguidance import LLMatcher
from pydantic import BaseModel
from test_api_tools import ASK, joined

from router.api.formats import grammars
from workers.grammar.vocabulary import GrammarVocabulary

API_THINKS = True

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["size", "count"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}


def ask(api: Api, **fields: Any) -> Any:
    return api.client.chat.completions.create(model="ernie-tiny", messages=ASK, **fields)


def complete(api: Api, **fields: Any) -> str:
    body = {"prompt": "Order:", "max_tokens": 200, **fields}
    response = api.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_follows_its_schema_behind_the_reasoning_and_in_streams(api: Api, seed: int) -> None:
    fields: dict[str, Any] = {"response_format": FORMAT, "seed": seed, "max_tokens": 400, "extra_body": {}}
    fields["extra_body"] = {"enable_thinking": False}
    message = ask(api, **fields).choices[0].message
    jsonschema.validate(json.loads(message.content), SCHEMA)
    streamed, reason = joined(ask(api, **fields, stream=True))
    assert (streamed["content"], reason) == (message.content, "stop")


def test_the_grammar_begins_where_reasoning_ends(api: Api) -> None:
    ask(api, response_format=FORMAT, max_tokens=2)
    tokenizer, grammar = api.backend.tokenizer, api.backend.requests[-1].params.grammar
    answer = '{"size": "small", "count": 7}'
    follows = [
        f"I think <of> it.\n</think>\n\n\n<response>\n{answer}\n</response>\n",
        f"so</think>{answer}",
        f"</think>{answer}",
    ]
    fails = [answer, f"so</think>{answer[:-1]}", f"so</think><tool_call>{answer}", f"<think></think>{answer}", "so"]
    assert [accepts(tokenizer, grammar, text) for text in (*follows, *fails)] == [True] * 3 + [False] * 5


def accepts(tokenizer: Any, grammar: str, text: str) -> bool:
    """Whether a text can be a whole output."""
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids))
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.encode(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and bool(matcher.is_accepting())


def test_the_clients_parse_method_gets_an_object(api: Api) -> None:
    class Order(BaseModel):
        size: Literal["small", "large"]
        notes: list[Literal["fast", "cheap"]]

    answer = api.client.chat.completions.parse(
        model="ernie-tiny", messages=ASK, response_format=Order, seed=3, max_tokens=400, extra_body={"enable_thinking": False}
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Order)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "^[a-c]{3,5}$"}}, "[a-c]{3,5}"),
        ({"structured_outputs": {"choice": ["yes", "no/never", 'a "b"']}}, 'yes|no/never|a "b"'),
        ({"structured_outputs": {"grammar": 'start: "x" y\ny: /[0-9]{2}/'}}, "x[0-9]{2}"),
        ({"guided_grammar": 'root ::= "x" y\ny ::= [0-9] [0-9]'}, "x[0-9]{2}"),
        ({"ebnf": 'root ::= "x" | "y"'}, "x|y"),
        ({"regex": "a/b+"}, "a/b+"),
        ({"guided_regex": r"\d{2}"}, r"\d{2}"),
        ({"guided_choice": ["on", "off"]}, "on|off"),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, r'\{"size":"\w+","count":\d+\}'),
        ({"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": "  "}, r'\{ *"size" *: *"\w+" *, *"count" *: *\d+ *\}'),
        ({"json_schema": SCHEMA}, r'(?s)\{\s*"size"\s*:\s*"\w+"\s*,\s*"count"\s*:\s*\d+\s*\}'),
    ],
)  # fmt: skip
def test_every_spelling_of_a_form_is_followed(api: Api, fields: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        text = complete(api, seed=seed, **fields)
        assert re.fullmatch(pattern, text), text


def test_json_objects_and_structural_tags(api: Api) -> None:
    ask(api, response_format={"type": "json_object"}, max_tokens=2, extra_body={"enable_thinking": False})
    tokenizer, grammar = api.backend.tokenizer, api.backend.requests[-1].params.grammar
    assert accepts(tokenizer, grammar, '{"a": [1, {"b": null}]}') and not accepts(tokenizer, grammar, "[1]")
    tags = {
        "structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}, {"begin": "<f=b>", "schema": {}, "end": "</f>"}],
        "triggers": ["<f="],
    }  # fmt: skip
    complete(api, structural_tag=tags, max_tokens=1)
    grammar = api.backend.requests[-1].params.grammar
    call = '<f=a>{"size": "small", "count": 3}</f>'
    assert accepts(tokenizer, grammar, "plain < text") and accepts(tokenizer, grammar, f"so {call} and {call}")
    assert not accepts(tokenizer, grammar, '<f=a>{"size": 1}</f>') and not accepts(tokenizer, grammar, "<f=c>1</f>")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json"}}, "response_format", "text, json_object or json_schema"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "not 'jsn'"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "send one of them"),
        ({"guided_regex": "a", "ebnf": "b"}, "ebnf", "guided_regex and ebnf both"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice must be an array of strings"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "json is not JSON"),
        ({"guided_json": 3}, "guided_json", "must be an object"),
        ({"regex": "(a"}, "regex", "unclosed group"),
        ({"regex": "(?=a)b"}, "regex", "look-around"),
        ({"guided_grammar": 'root ::= "a'}, "guided_grammar", "no grammar: Unexpected end of input at line 1"),
        ({"guided_grammar": "start: nobody"}, "guided_grammar", "unknown name"),
        ({"json_schema": {"type": "objec"}}, "json_schema", r"at \$: Invalid type: objec"),
        (
            {"json_schema": {"properties": {"a": {"items": {"anyOf": [{}, {"not": {}}]}}}}},
            "json_schema",
            r"at \$\.properties\.a\.items\.anyOf\[1\]: Unimplemented keys: \[\"not\"\]",
        ),
        ({"structural_tag": {"structures": [{"begin": "<a>", "end": ""}], "triggers": ["<b"]}}, "structural_tag", "none of the triggers"),
        ({"regex": "a" * (129 << 10)}, "regex", "at most 131072 characters"),
        ({"regex": "(a|b)*" * 4000}, "regex", "cannot be followed"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs", "surrogate|characters|not valid JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_before_anything_runs(
    api: Api, fields: dict[str, Any], param: str, message: str
) -> None:
    response = api.http.post("/v1/completions", content=json.dumps({"prompt": "x", **fields}))
    error = error_of(response)
    assert response.status_code == 400 and re.search(message, error["message"]), error
    assert error["param"] in (param, None) and not api.backend.requests


def test_workers_that_read_no_grammars_are_not_sent_any(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.backend, "model", replace(MODEL, grammars=""))
    response = api.http.post("/v1/completions", json={"prompt": "x", "regex": "a"})
    assert response.status_code == 400 and "the workers: structured output needs" in error_of(response)["message"]


# ---- calls ----

CITY = {"type": "object", "properties": {"city": {"enum": ["Berlin", "Paris"]}}, "required": ["city"], "additionalProperties": False}  # fmt: skip
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": NOTHING}},
]


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_comes_and_its_arguments_are_valid(api: Api, seed: int) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
    fields |= {"extra_body": {"enable_thinking": False}, "max_tokens": 300}
    (choice,) = ask(api, **fields).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    jsonschema.validate(
        json.loads(call.function.arguments), CITY if call.function.name == "weather" else {"maxProperties": 0}
    )
    streamed, reason = joined(ask(api, **fields, stream=True))
    assert reason == "tool_calls" and streamed["calls"][0][1:] == [call.function.name, call.function.arguments]


def test_a_named_call_is_the_one_that_was_named(api: Api) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        (choice,) = ask(
            api, tools=TOOLS, tool_choice=named, seed=seed, max_tokens=300, extra_body={"enable_thinking": False}
        ).choices
        assert [call.function.name for call in choice.message.tool_calls] == ["weather"]


def test_a_call_that_is_cut_short_is_reported_as_such(api: Api) -> None:
    (choice,) = ask(api, tools=TOOLS, tool_choice="required", max_tokens=1).choices
    assert choice.finish_reason == "length" and not choice.message.tool_calls


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'


def grammar_for(api: Api, **fields: Any) -> str:
    ask(api, max_tokens=1, **fields)
    return str(api.backend.requests[-1].params.grammar)


def test_strict_tools_are_followed_and_loose_ones_are_not_enforced(api: Api) -> None:
    strict: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}]
    tokenizer = api.backend.tokenizer
    assert grammar_for(api, tools=TOOLS) == ""
    grammar = grammar_for(api, tools=strict)
    good, bad = call("weather", '{"city": "Paris"}'), call("weather", '{"city": "Rome"}')
    follows = [
        "</think>\n\n<response>\nNo <call> at all.\n</response>\n",
        f"so\n</think>\n\n\n{good}",
        f"</think>First {good}{good}",
    ]
    assert [accepts(tokenizer, grammar, text) for text in follows] == [True] * 3
    assert not accepts(tokenizer, grammar, f"</think>{bad}")
    one = grammar_for(api, tools=strict, parallel_tool_calls=False)
    assert accepts(tokenizer, one, f"</think>{good}") and not accepts(tokenizer, one, f"</think>{good}{good}")


def test_an_answer_of_a_form_and_calls_may_be_offered_together(api: Api) -> None:
    grammar, tokenizer = grammar_for(api, tools=TOOLS, response_format=FORMAT), api.backend.tokenizer
    assert accepts(tokenizer, grammar, "</think>" + call("now", "{}") + call("weather", '{"city": "Paris"}'))
    assert accepts(tokenizer, grammar, '</think>{"size": "small", "count": 1}')
    assert not accepts(tokenizer, grammar, "</think>Hello")


def test_tags_that_are_no_tokens_are_followed_as_text() -> None:
    form = grammars.OutputFormat(("<think>", "</think>"), None, ("<tool_call>", "</tool_call>"))
    assert form.call is not None
    one = grammars.call_rule([grammars.CallableTool("f", None, True)], form.call, {})
    for rule in (grammars.calls_rule(one, True), grammars.text_with_calls(one, form, True, {})):
        assert vocabulary().problem_of(grammars.whole(grammars.behind_reasoning(rule, form, True, {}))) == ""


def test_completions_of_the_openai_client_are_constrained(api: Api) -> None:
    answer = api.client.completions.create(
        model="ernie-tiny", prompt="x", max_tokens=50, extra_body={"regex": "[ab]{3}"}
    )
    assert re.fullmatch("[ab]{3}", answer.choices[0].text)
    with pytest.raises(openai.BadRequestError, match="unclosed"):
        api.client.completions.create(model="ernie-tiny", prompt="x", extra_body={"regex": "("})
