"""Turns a parsed body into a Job: the requests to run and how their answer is to look. Nothing here waits or submits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from router.api.beam_requests import read_plan, without_sampling
from router.api.beams import BeamPlan
from router.api.formats.grammars import whole
from router.api.naming import Naming
from router.api.prompts import Prompt, check_length, check_token_ids, read_prompts
from router.api.schema import ChatBody, CompletionBody, GenerationBody
from router.api.speech import Speech, num_kept, read_conversation, require_model, speech_of
from router.api.structure import FORM_FIELDS, read_structure
from router.api.turns import Turn
from router.config import ApiConfig
from router.wishes import NO_WISHES, Wishes, session_number
from workers.errors import InvalidRequest
from workers.kv_cache.block_hash import PromptTokens
from workers.limits import ALTERNATIVES, RequestLimits
from workers.request import Request
from workers.status import ModelInfo
from workers.text.tokenizer import Tokenizer

_INT32_MAX = 2**31 - 1
_DEFAULT_COMPLETION_TOKENS = 16
_MAX_TARGET_S = 3600
_MAX_SALT_CHARACTERS = 1024
_CHARACTERS_PER_TOKEN = 4
"""Of bad words, which are tokenized, each in two forms, before the request can be answered."""


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP generation request. `requests` are prompt-major; choice i belongs to prompt i // n."""

    job_id: str
    created: int
    model: str
    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    n: int
    """Choices that are drawn of each prompt."""
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None
    """Top entries the client asked for per token; None: no logprobs."""
    prompt_logprobs: int | None
    echo: bool
    hide_output: bool
    """max_tokens 0 with echo: one token is drawn, because the engine must, and not shown."""
    return_token_ids: bool
    tokens_as_ids: bool
    trace: bool
    speech: Speech
    wishes: Wishes = NO_WISHES
    """The same for all requests."""
    turn: Turn | None = None
    """Set where the answer is remembered for the conversation's next turn."""
    priority: int | None = None
    """As the client has it; None: it says none."""
    cache_salt: str = ""
    """The client's own; what becomes of it is in the requests."""
    num_best: int = 0
    """Of the choices of each prompt so many are shown, the likeliest first; 0: all, as they stand."""
    beams: BeamPlan | None = None
    """The choices of a prompt are the beams of a search."""


def translate_chat(
    body: ChatBody, model: ModelInfo | None, tokenizer: Tokenizer, config: ApiConfig, naming: Naming | None = None
) -> Job:
    """Raises InvalidRequest, Rejected (unknown model, too long) or Refused (no model is known yet)."""
    require_model(body.model, model)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    if body.logprob_token_ids and not body.logprobs:
        raise InvalidRequest("logprob_token_ids needs logprobs: true", "logprob_token_ids")
    chat = read_conversation(body, model, tokenizer, config)
    info, prompt = chat.info, chat.prompt
    room = info.max_model_len - len(prompt.token_ids)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    speech = speech_of(body, chat, tokenizer)
    param = "messages" if body.prompt_token_ids is None else "prompt_token_ids"
    return make_job(body, info, tokenizer, config, [prompt], param, room, logprobs, speech, naming)


def translate_completion(
    body: CompletionBody, model: ModelInfo | None, tokenizer: Tokenizer, config: ApiConfig, naming: Naming | None = None
) -> Job:
    """Raises InvalidRequest, Rejected (unknown model, too long) or Refused (no model is known yet)."""
    info = require_model(body.model, model)
    if isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int):
        _check_bound(len(body.prompt), config.max_prompts, "prompt")
    prompts = read_prompts(body.prompt, tokenizer, info, body.add_special_tokens is not False, num_kept(body, info))
    default_tokens = _DEFAULT_COMPLETION_TOKENS
    return make_job(body, info, tokenizer, config, prompts, "prompt", default_tokens, body.logprobs, naming=naming)


def make_job(
    body: GenerationBody,
    info: ModelInfo,
    tokenizer: Tokenizer,
    config: ApiConfig,
    prompts: list[Prompt],
    param: str,
    default_max_tokens: int,
    logprobs: int | None,
    speech: Speech | None = None,
    naming: Naming | None = None,
) -> Job:
    """The job of prompts that share what `body` asks for; `param` names them in errors. `naming` None: a new one. Raises
    InvalidRequest, Rejected."""
    naming = naming or Naming.new()
    echo = isinstance(body, CompletionBody) and bool(body.echo)
    asked_n = 1 if body.n is None else body.n
    _check_bound(asked_n, config.max_n, "n")
    n = _num_drawn(body, asked_n, config.max_n)
    _check_bound(n * len(prompts), config.max_choices, "n")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")
    if not -_INT32_MAX <= (body.priority or 0) <= _INT32_MAX:
        raise InvalidRequest("priority must fit in 32 bits", "priority")
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    hide_output = asked == 0 and echo
    fields = _sampling_fields(body, info, tokenizer)
    if speech is None:
        asks_for_form = not body.model_fields_set.isdisjoint(FORM_FIELDS)
        speech = Speech(wanted=read_structure(body, tokenizer.added_tokens) if asks_for_form else None)
    if speech.budget is not None:
        fields["thinking"] = speech.budget
    if speech.wanted is not None:
        fields["grammar"] = whole(speech.wanted.rule)
    if speech.is_read and tokenizer.hides(speech.form.tags):
        fields["skip_special_tokens"] = False
    named = check_token_ids(body.logprob_token_ids or (), info.vocab_size, "logprob_token_ids")
    asked_in = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
    logprobs = 0 if named else _alternatives(logprobs, info, asked_in)
    prompt_logprobs = _alternatives(body.prompt_logprobs, info, "prompt_logprobs")
    scored = max(logprobs, prompt_logprobs or 0) if echo and logprobs is not None else prompt_logprobs
    fields |= {"logprobs": logprobs, "prompt_logprobs": scored, "logprob_token_ids": named}
    if config.sampling_defaults.seed is None:
        fields.setdefault("seed", naming.seed)
    if body.use_beam_search:
        fields |= without_sampling(body, fields)
    if n > asked_n and logprobs is None:
        fields["logprobs"] = 0
    logprobs = len(named) or logprobs
    num_scores = 0 if scored is None else n * (scored + 1) * sum(len(prompt.token_ids) for prompt in prompts)
    if num_scores > config.max_prompt_scores:
        message = f"logprobs of the prompt would have {num_scores} entries, {config.max_prompt_scores} are allowed: ask for fewer alternatives or choices"
        raise InvalidRequest(message, "prompt_logprobs" if prompt_logprobs is not None else "echo")
    job_id = naming.job_id
    requests: list[Request] = []
    for place, prompt in enumerate(prompts):
        room = info.max_model_len - len(prompt.token_ids)
        max_tokens = 1 if hide_output else min(default_max_tokens, room) if asked is None else asked
        if body.clamp_max_tokens:
            max_tokens = max(1, min(max_tokens, room))
        own, tokens = replace(config.sampling_defaults, **fields, max_tokens=max_tokens), PromptTokens(prompt.token_ids)
        own.validate(info.vocab_size, info.limits)
        check_length(len(prompt.token_ids), info, param, max_tokens)
        if (logprobs or 0) > ALTERNATIVES and n * max_tokens * (logprobs or 0) > config.max_alternatives:
            most = config.max_alternatives // (n * (logprobs or 0))
            raise InvalidRequest(
                f"with {logprobs} alternatives for each token, max_tokens is at most {most}, not {max_tokens}",
                "max_tokens",
            )
        requests += [
            Request(f"{job_id}-{place}-{choice}", tokens, own, choice, priority=body.priority or 0)
            for choice in range(n)
        ]
    options = body.stream_options
    return Job(
        job_id=job_id,
        created=naming.created,
        model=info.name,
        prompts=tuple(prompts),
        requests=tuple(requests),
        n=n,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.include_usage and options.continuous_usage_stats),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        echo=echo,
        hide_output=hide_output,
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        trace=bool(body.trace),
        wishes=_wishes(body),
        priority=body.priority,
        cache_salt=_cache_salt(body),
        speech=speech,
        num_best=asked_n if n > asked_n else 0,
        beams=read_plan(body, requests, n, info, tokenizer, config.max_beam_tokens),
    )


def _num_drawn(body: GenerationBody, shown: int, most: int) -> int:
    """Choices that are computed of each prompt. Raises InvalidRequest."""
    wanted, param = body.best_of, "best_of"
    if body.use_beam_search and body.beam_width is not None:
        wanted, param = body.beam_width, "beam_width"
    drawn = shown if wanted is None else wanted
    if not shown <= drawn <= most:
        raise InvalidRequest(f"{param} must be between n, {shown}, and {most}, not {drawn}", param)
    if drawn > shown and body.stream:
        raise InvalidRequest(f"{param} above n cannot be streamed: the best are known when all have ended", "stream")
    return drawn


def _alternatives(asked: int | None, info: ModelInfo, param: str) -> int | None:
    """-1 asks for all of the vocabulary. Raises InvalidRequest for more than the workers' limit."""
    if asked is None:
        return None
    count = info.vocab_size if asked == -1 else asked
    if not 0 <= count <= (most := info.limits.logprobs):
        every = f"; -1 would be {count}, all of the vocabulary" if asked == -1 else ""
        raise InvalidRequest(f"{param} must be between 0 and {most} (worker.limits.logprobs){every}", param)
    return count


def _wishes(body: GenerationBody) -> Wishes:
    """Targets and session. `user` is any value for the API; it names a session where it is text and nothing better does."""
    targets = {}
    for name, value in (("ttft", body.ttft), ("tpot", body.tpot)):
        if value is not None and not 0 < value <= _MAX_TARGET_S:
            raise InvalidRequest(f"{name} must be above 0 and at most {_MAX_TARGET_S} seconds", name)
        targets[f"{name}_s"] = float(value or 0.0)
    session = body.session_id or body.prompt_cache_key or (body.user if isinstance(body.user, str) else "")
    return Wishes(
        targets["ttft_s"],
        targets["tpot_s"],
        session_number(session) if session else 0,
        bool(body.trace),
        read_timeout(body.timeout),
    )


def read_timeout(asked: float | str | None, other_s: float = 0.0) -> float:
    """Seconds that a request may take, the shorter of two; 0: nothing is said. Raises InvalidRequest."""
    if asked is None:
        return other_s
    try:
        timeout_s = float(asked)
    except (ValueError, OverflowError):
        timeout_s = math.nan
    if not 0 < timeout_s <= _MAX_TARGET_S:
        raise InvalidRequest(f"timeout must be above 0 and at most {_MAX_TARGET_S} seconds", "timeout")
    return min(timeout_s, other_s) if other_s else timeout_s


def _cache_salt(body: GenerationBody) -> str:
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= _MAX_SALT_CHARACTERS:
        raise InvalidRequest(f"cache_salt must have 1 to {_MAX_SALT_CHARACTERS} characters", "cache_salt")
    return body.cache_salt or ""


def _sampling_fields(body: GenerationBody, info: ModelInfo, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the client says of how tokens are drawn, by the names of SamplingParams; max_tokens and logprobs are the caller's."""
    given: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        if (value := getattr(body, name)) is not None:
            given[name] = _finite(value, name)
    for name in ("seed", "min_tokens", "ignore_eos", "skip_special_tokens"):
        if (value := getattr(body, name)) is not None:
            given[name] = value
    if body.include_stop_str_in_output is not None:
        given["include_stop"] = body.include_stop_str_in_output
    if body.stop is not None:
        given["stop"] = tuple(dict.fromkeys([body.stop] if isinstance(body.stop, str) else body.stop))
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = check_token_ids(body.stop_token_ids, info.vocab_size, "stop_token_ids")
    if body.allowed_token_ids is not None:
        given["allowed_token_ids"] = check_token_ids(body.allowed_token_ids, info.vocab_size, "allowed_token_ids")
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    if body.bad_words is not None:
        given["bad_words"] = _bad_words(body.bad_words, tokenizer, info.limits)
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else min(body.top_k, info.vocab_size)
    if given.get("top_p") == 0:  # as OpenAI takes it: of the nucleus the likeliest token is left
        given |= {"top_p": 1.0, "top_k": 1}
    return given


def _finite(value: float, param: str) -> float:
    """A float that holds; JSON integers may be larger than any."""
    if not -1e9 <= value <= 1e9 or not math.isfinite(value):
        raise InvalidRequest(f"{param} is out of range", param)
    return float(value)


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    pairs = []
    for token, bias in biases.items():
        if not token.isascii() or not token.isdecimal() or len(token) > 10:
            raise InvalidRequest(f"logit_bias needs token ids as keys, not {token!r:.80}", "logit_bias")
        pairs.append((int(token), _finite(bias, "logit_bias")))
    return tuple(pairs)


def _bad_words(
    words: list[str | list[int]], tokenizer: Tokenizer, limits: RequestLimits
) -> tuple[tuple[int, ...], ...]:
    """A word is forbidden as it begins a text and as it follows a blank: those are different tokens."""
    if len(words) > limits.bad_words:
        raise InvalidRequest(f"bad_words takes at most {limits.bad_words} words", "bad_words")
    if sum(len(word) for word in words) > (most := _CHARACTERS_PER_TOKEN * limits.bad_word_tokens):
        raise InvalidRequest(f"bad_words takes at most {most} characters or tokens in all", "bad_words")
    sequences: list[tuple[int, ...]] = []
    for word in words:
        if isinstance(word, str):
            if not word.strip():
                raise InvalidRequest("bad_words must not contain an empty word", "bad_words")
            sequences += [tuple(tokenizer.encode(form)) for form in (word, " " + word.lstrip())]
        else:
            sequences.append(tuple(word))
    return tuple(dict.fromkeys(sequences))


def _check_bound(count: int, bound: int, param: str) -> None:
    if not 1 <= count <= bound:
        raise InvalidRequest(f"{param} must ask for between 1 and {bound} choices, not {count}", param)
