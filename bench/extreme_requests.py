"""For each field of each request body the most that a client may ask for, and a little more: what is legal but dear, and what is to be
refused before it costs anything. A field without an entry fails tests/unit/test_extreme_requests.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from router.api.admin_schema import DrainBody, RoleBody
from router.api.schema import (
    MAX_VALUES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    StreamOptions,
    TokenizeBody,
)
from router.config import ApiConfig
from workers.limits import DEFAULT_LIMITS

BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/chat/completions": (ChatBody, StreamOptions),
    "/v1/completions": (CompletionBody, StreamOptions),
    "/tokenize": (TokenizeBody,),
    "/detokenize": (DetokenizeBody,),
    "/admin/workers/nobody/role": (RoleBody,),
    "/admin/workers/nobody/drain": (DrainBody,),
}
"""By path: the bodies whose fields are tried there."""
_INT64 = 2**63 - 1
_WIDEST = DEFAULT_LIMITS.logprobs - 2
"""Beams: two tokens end a text."""


@dataclass(frozen=True, slots=True)
class Case:
    """One body; `name` says which field's extreme it is."""

    path: str
    name: str
    body: dict[str, Any]


def cases(vocab_size: int, max_model_len: int, config: ApiConfig | None = None) -> Iterator[Case]:
    """Every extreme of every field, at every path that has the field."""
    extremes = Extremes(vocab_size, max_model_len, config or ApiConfig())
    for path, kinds in BODIES.items():
        for field in fields_at(path, kinds):
            for number, update in enumerate(extremes.of(path, field)):
                yield Case(path, f"{field}[{number}]", extremes.ordinary(path) | update)
        yield from (
            Case(path, f"unknown[{n}]", extremes.ordinary(path) | update) for n, update in enumerate(extremes.unknown)
        )


def fields_at(path: str, kinds: tuple[type[BaseModel], ...]) -> list[str]:
    """Those to be tried there: what both generating endpoints share is read by the same code, and tried at one."""
    shared = GenerationBody.model_fields.keys() if path == "/v1/chat/completions" else set()
    return list(dict.fromkeys(name for kind in kinds for name in kind.model_fields if name not in shared))


class Extremes:
    """The values, for one model and one set of bounds."""

    def __init__(self, vocab_size: int, max_model_len: int, config: ApiConfig) -> None:
        self._vocab_size, self._max_len, self._config = vocab_size, max_model_len, config
        self._huge = config.max_body_bytes - 4096
        """Characters of the longest text that a body can hold."""
        self._full = max_model_len - 8
        """Tokens of a prompt that leaves room for a short answer."""

    def ordinary(self, path: str) -> dict[str, Any]:
        short = {"max_tokens": 3, "seed": 1}
        return {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], **short},
            "/v1/completions": {"prompt": "Hi", **short},
            "/tokenize": {},
            "/detokenize": {"tokens": [5]},
            "/admin/workers/nobody/role": {"role": "mixed"},
        }.get(path, {})

    def of(self, path: str, field: str) -> list[dict[str, Any]]:
        """Updates of an ordinary body. Raises KeyError for a field that nobody has thought of."""
        if field == "logprobs":
            chat = path.startswith("/v1/chat")
            return [{field: True if chat else 20, "top_logprobs": 20 if chat else None, "n": 32}, {field: 21}]
        return self._values[field]

    @cached_property
    def unknown(self) -> list[dict[str, Any]]:
        """Fields that nobody knows, which are read and dropped."""
        deep: Any = 1
        for _ in range(180):
            deep = {"a": [deep]}
        return [
            {"user": "x" * self._huge},
            {"metadata": {str(place): place for place in range(200_000)}},
            {"nobody_knows_this": deep},
        ]

    @cached_property
    def _values(self) -> dict[str, list[dict[str, Any]]]:
        text, ids = "the sky is blue and ", [5 + place % (self._vocab_size - 5) for place in range(self._full)]
        numbers = {
            "temperature": (0, 1e-9, 2, 10**400),
            "top_p": (0, 1e-9, 1),
            "top_k": (-1, 1, self._vocab_size, _INT64),
            "min_p": (0, 1),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "repetition_penalty": (1e-9, 100),
            "seed": (-_INT64 - 1, _INT64),
            "min_tokens": (3, _INT64),
            "priority": (-(2**31) + 1, 2**31 - 1),
            "n": (self._config.max_n, self._config.max_n + 1, 10**400),
            "best_of": (self._config.max_n, self._config.max_n + 1, 10**400),
            "length_penalty": (-10, 10, 10**400),
            "beam_width": (_WIDEST, _WIDEST + 1, 10**400),
            "max_tokens": (self._max_len - 64, _INT64),
            "max_completion_tokens": (self._max_len - 64, _INT64),
            "top_logprobs": (20, 21),
        }
        values = {name: [{name: value} for value in tried] for name, tried in numbers.items()}
        values["top_logprobs"] = [{**each, "logprobs": True} for each in values["top_logprobs"]]
        beams = {"use_beam_search": True, "max_tokens": 8}
        values |= {name: [{**beams, **each} for each in values[name]] for name in ("length_penalty", "beam_width")}
        values["use_beam_search"] = [{**beams, "best_of": _WIDEST}, {**beams, "max_tokens": self._max_len - 64}]
        values["early_stopping"] = [
            {**beams, "beam_width": _WIDEST, "early_stopping": value} for value in (True, "never")
        ]
        flags = (
            "stream",
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "add_special_tokens",
            "trace",
        )
        flags += (
            "return_token_ids",
            "return_tokens_as_token_ids",
            "add_generation_prompt",
            "return_token_strs",
            "force",
            "pin",
            "continue_final_message",
            "clamp_max_tokens",
            "guided_json_object",
        )
        values |= {name: [{name: value} for value in (True, False)] for name in flags}
        values |= {
            name: [{name: value} for value in (1e-9, 1e9, 0, -1, 10**400)] for name in ("ttft", "tpot", "timeout")
        }
        values |= {
            name: [{name: "x" * self._huge}] for name in ("session_id", "prompt_cache_key", "user", "cache_salt")
        }
        values["user"] += [{"user": self.unknown[2]}]
        half = DEFAULT_LIMITS.bad_words // 2
        words = [[5 + place % 1000, *[7] * (DEFAULT_LIMITS.bad_word_tokens // half - 2), 9] for place in range(half)]
        function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        values |= {
            name: [{name: "x" * self._huge}, {name: self.unknown[2]}]
            for name in (
                *("guided_regex", "guided_grammar", "guided_json", "structural_tag"),
                *("regex", "ebnf", "json_schema"),
            )
        }
        values |= {
            name: [{name: self.unknown[2]}, {name: {"type": "json_schema", "json": "x" * self._huge}}]
            for name in ("response_format", "structured_outputs", "guided_decoding")
        }
        budgets = ("thinking_token_budget", "reasoning_max_tokens")
        values |= {name: [{name: value} for value in (0, 1, _INT64)] for name in budgets}
        many = [str(place) for place in range(20_000)]
        return values | {
            "guided_choice": [{"guided_choice": many}, {"guided_choice": self.unknown[2]}],
            "guided_whitespace_pattern": [
                {"guided_whitespace_pattern": "x" * self._huge, "guided_json": {"type": "object"}}
            ],
            "truncate_prompt_tokens": [{"truncate_prompt_tokens": value} for value in (-1, 1, _INT64)],
            "allowed_token_ids": [
                {"allowed_token_ids": [place % self._vocab_size for place in range(DEFAULT_LIMITS.allowed_token_ids)]},
                {"allowed_token_ids": list(range(400_000))},
            ],
            "documents": [{"documents": [{"text": "x" * self._huge}]}, {"documents": [{}] * 100_000}],
            "chat_template": [{"chat_template": "{{ 1 }}" * 9000}, {"chat_template": "x" * self._huge}],
            "prompt_token_ids": [
                {"prompt_token_ids": [5] * self._full, "messages": []},
                {"prompt_token_ids": [5] * 400_000, "messages": []},
            ],
            "web_search": [
                {"web_search": {"references": "x" * self._huge, "date": "today"}},
                {"web_search": {"references": [{"title": "x"}] * 100_000, "date": "today"}},
            ],
            "enable_thinking": [{"enable_thinking": True}, {"enable_thinking": False}],
            "include_reasoning": [{"include_reasoning": False}],
            "parallel_tool_calls": [{"parallel_tool_calls": True}],
            "thinking": [{"thinking": {"type": "enabled", "x": "y" * self._huge}}, {"thinking": self.unknown[2]}],
            "tools": [
                {"tools": [{**function, "function": {**function["function"], "name": f"f{n}"}} for n in range(2000)]},
                {"tools": [{**function, "function": {**function["function"], "parameters": self.unknown[2]}}]},
                {"tools": [function], "tool_choice": "required", "n": 32},
                {"tools": [{}] * 100_000},
            ],
            "tool_choice": [{"tool_choice": "x" * self._huge}, {"tool_choice": self.unknown[2], "tools": [function]}],
            "model": [{"model": "x" * self._huge}],
            "stream_options": [
                {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
            ],
            "include_usage": [{"stream": True, "n": 32, "stream_options": {"include_usage": True}}],
            "continuous_usage_stats": [{"stream": True, "n": 32, "stream_options": {"continuous_usage_stats": True}}],
            "logit_bias": [
                {
                    "logit_bias": {
                        str(token): -100 for token in range(min(DEFAULT_LIMITS.logit_bias, self._vocab_size))
                    },
                    "n": 64,
                },
                {"logit_bias": {"0" * zeros + str(token): 1 for zeros in range(6) for token in range(1000)}, "n": 64},
                {"logit_bias": {str(token): 1 for token in range(200_000)}},
            ],
            "bad_words": [
                {"bad_words": words, "n": 64},
                {"bad_words": [f"{place:05d} the" for place in range(half)], "n": 64},
                {"bad_words": ["a" * (self._huge)]},
                {"bad_words": [[7] * 400_000]},
            ],
            "stop": [
                {"stop": [f"{place:07d}" for place in range(DEFAULT_LIMITS.stop_strings)], "n": 64},
                {"stop": ["a" * length for length in range(1, 120)], "n": 64},
                {"stop": ["a" * DEFAULT_LIMITS.stop_characters], "n": 128},
                {"stop": [str(place) for place in range(400_000)], "n": 128},
                {"stop": "a" * self._huge},
            ],
            "stop_token_ids": [
                {
                    "stop_token_ids": [place % self._vocab_size for place in range(DEFAULT_LIMITS.stop_token_ids)],
                    "n": 64,
                    "min_tokens": 3,
                },
                {"stop_token_ids": [5] * 400_000},
            ],
            "logprob_token_ids": [
                {"logprobs": 1, "logprob_token_ids": list(range(5, 5 + DEFAULT_LIMITS.logprobs)), "n": 32},
                {"logprobs": 1, "logprob_token_ids": list(range(5, 6 + DEFAULT_LIMITS.logprobs))},
                {"logprobs": 1, "logprob_token_ids": [5] * 400_000},
            ],
            "prompt_logprobs": [
                {"prompt_logprobs": 20, "prompt": ids, "messages": [{"role": "user", "content": text * 300}]},
                {"prompt_logprobs": 20, "n": 64, "echo": True},
                {"prompt_logprobs": 21},
            ],
            "echo": [{"echo": True, "prompt": ids, "logprobs": 20}, {"echo": True, "prompt": ids, "max_tokens": 0}],
            "prompt": [
                {"prompt": ids},
                {"prompt": ids, "n": self._config.max_n},
                {"prompt": [ids[place:] + ids[:place] for place in range(40)]},
                {"prompt": [text * 40 + str(place) for place in range(self._config.max_prompts)]},
                {"prompt": ["a"] * self._config.max_prompts, "n": 2},
                {"prompt": ["a"] * (self._config.max_prompts + 1)},
                {"prompt": [5] * (MAX_VALUES - 8)},
                {"prompt": text * (self._huge // len(text))},
                {"prompt": " " * self._huge},
                {"prompt": "a" * self._huge},
                {"prompt": "\U0001f600" * (self._huge // 4)},
            ],
            "messages": [
                {"messages": [{"role": "user", "content": text * 300}]},
                {"messages": [{"role": ("user", "assistant")[place % 2], "content": "<s>"} for place in range(8192)]},
                {"messages": [{"role": "user", "content": "a"}] * 8193},
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 200_000}]},
                {"messages": [{"role": "user", "content": "<|end_of_sentence|>" * 3000}]},
                {"messages": [{"role": "user", "content": "<" * self._huge}]},
                {"messages": [{"role": "user", "content": "a" * self._huge}]},
                {"messages": [{"role": "user", "content": "a", "name": "x" * self._huge}]},
                {"messages": [{str(place): place for place in range(200_000)}]},
            ],
            "chat_template_kwargs": [
                {"chat_template_kwargs": self.unknown[2]},
                {"chat_template_kwargs": {"x": "y" * self._huge}},
                {"chat_template_kwargs": {f"x{place}": place for place in range(200_000)}},
            ],
            "reasoning_effort": [{"reasoning_effort": "x" * self._huge}],
            "tokens": [{"tokens": ids}, {"tokens": [5] * (MAX_VALUES - 8)}, {"tokens": ["x" * self._huge]}],
            "role": [{"role": "x" * self._huge}],
            "drain": [{"drain": False}],
        }
