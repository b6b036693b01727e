"""Translates requests and their outputs between protobuf messages and values; decides nothing.

As in wire.py: `x_to_pb` and `x_from_pb`. Floats of a LogitBias and of logprobs travel in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from math import inf, isfinite
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from workers.errors import InvariantViolated, Refusal
from workers.kv_cache.block_hash import PromptTokens
from workers.pb import worker_pb2 as pb
from workers.request import FinishReason, HandoffReport, Output, Request, SamplingParams, ThinkingBudget, make_tuple
from workers.token_logprobs import PromptScores, TokenLogprob

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@cache
def _plan(kind: type) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """Names of a class's fields, and what reads them off a value or a message; worked out once, since this is asked with every message."""
    names = tuple(field.name for field in fields(kind) if field.init)
    if len(names) < 2:
        return names, lambda value: tuple(getattr(value, name) for name in names)
    return names, attrgetter(*names)


def fields_of(value: DataclassInstance) -> dict[str, Any]:
    """What the message is made of; protobuf raises ValueError where it has no such field."""
    names, read = _plan(type(value))
    return dict(zip(names, read(value), strict=True))


def from_fields(kind: type[T], message: Any) -> T:
    return kind(*_plan(kind)[1](message))


_TIMES = tuple(field.name for field in fields(HandoffReport) if field.name.endswith("_s"))


def params_to_pb(params: SamplingParams) -> pb.SamplingParams:
    """Raises InvariantViolated when the seed is not concrete."""
    if params.seed is None:
        raise InvariantViolated("a request leaves the router with a concrete seed")
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        logit_bias=[pb.LogitBias(token_id=token, bias=bias) for token, bias in params.logit_bias],
        bad_words=[pb.TokenIds(token_ids=words) for words in params.bad_words],
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        include_stop=params.include_stop,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        grammar=params.grammar,
        allowed_token_ids=params.allowed_token_ids,
        thinking=None if params.thinking is None else pb.ThinkingBudget(**fields_of(params.thinking)),
        logprob_token_ids=params.logprob_token_ids,
    )


def params_from_pb(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        seed=message.seed,
        # Most requests have neither: no generators for them.
        logit_bias=tuple((p.token_id, p.bias) for p in message.logit_bias) if message.logit_bias else (),
        bad_words=tuple(tuple(words.token_ids) for words in message.bad_words) if message.bad_words else (),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        skip_special_tokens=message.skip_special_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=message.grammar,
        allowed_token_ids=tuple(message.allowed_token_ids) if message.allowed_token_ids else (),
        thinking=_thinking_from_pb(message.thinking) if message.HasField("thinking") else None,
        logprob_token_ids=tuple(message.logprob_token_ids) if message.logprob_token_ids else (),
    )


def _thinking_from_pb(message: pb.ThinkingBudget) -> ThinkingBudget:
    start = message.start_token_id if message.HasField("start_token_id") else None
    return ThinkingBudget(message.num_tokens, message.end_token_id, tuple(message.closing), start)


def request_to_pb(request: Request) -> pb.Request:
    """A worker of an older version reads no parameters in a constrained request, and refuses it rather than answer freely."""
    params = params_to_pb(request.params)
    is_constrained = request.params.is_constrained or bool(request.params.logprob_token_ids)
    message = pb.Request(
        request_id=request.request_id,
        params=None if is_constrained else params,
        constrained=params if is_constrained else None,
        choice_index=request.choice_index,
        replay_token_ids=request.replay_token_ids,
        priority=request.priority,
        traceparent=request.traceparent,
        cache_salt=request.cache_salt,
    )
    message.MergeFromString(_written(request.prompt_token_ids))
    return message


def _written(prompt: tuple[int, ...]) -> bytes:
    """A message with nothing else in it: reading that takes a fifth of what making it from the tokens does, and choices share it."""
    form = prompt.forms.get("pb.Request") if isinstance(prompt, PromptTokens) else None
    if form is None:
        form = pb.Request(prompt_token_ids=prompt).SerializeToString()
        if isinstance(prompt, PromptTokens):
            prompt.forms["pb.Request"] = form
    return form


def request_from_pb(message: pb.Request) -> Request:
    return Request(
        request_id=message.request_id,
        prompt_token_ids=PromptTokens(message.prompt_token_ids),
        params=params_from_pb(message.constrained if message.HasField("constrained") else message.params),
        choice_index=message.choice_index,
        replay_token_ids=tuple(message.replay_token_ids),
        priority=message.priority,
        traceparent=message.traceparent,
        cache_salt=message.cache_salt,
    )


def token_logprob_to_pb(entry: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top]
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=top, rank=entry.rank)


def token_logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    """Raises ValueError for what is no logarithm of a probability: JSON could not say it."""
    top = tuple((entry.token_id, entry.logprob) for entry in message.top)
    if not all(map(isfinite, (message.logprob, *(logprob for _, logprob in top)))):
        raise ValueError("a log-probability that is not finite")
    rank = message.rank if message.HasField("rank") else None
    return TokenLogprob(message.token_id, message.logprob, top, rank)


def scores_to_pb(scores: PromptScores) -> pb.PromptScores:
    return pb.PromptScores(
        first=scores.first,
        num_top=scores.top_ids.shape[1],
        token_ids=scores.token_ids.astype("<i4").tobytes(),
        logprobs=scores.logprobs.astype("<f4").tobytes(),
        ranks=scores.ranks.astype("<i4").tobytes(),
        top_ids=scores.top_ids.astype("<i4").tobytes(),
        top_logprobs=scores.top_logprobs.astype("<f4").tobytes(),
    )


def scores_from_pb(message: pb.PromptScores) -> PromptScores:
    """Raises ValueError when the arrays do not belong together, or hold what is no logarithm."""
    token_ids = np.frombuffer(message.token_ids, "<i4")
    if not all(np.isfinite(np.frombuffer(part, "<f4")).all() for part in (message.logprobs, message.top_logprobs)):
        raise ValueError("a log-probability that is not finite")
    shape = (len(token_ids), message.num_top)
    return PromptScores(
        message.first,
        token_ids,
        np.frombuffer(message.logprobs, "<f4").reshape(len(token_ids)),
        np.frombuffer(message.ranks, "<i4").reshape(len(token_ids)),
        np.frombuffer(message.top_ids, "<i4").reshape(shape),
        np.frombuffer(message.top_logprobs, "<f4").reshape(shape),
    )


def handoff_report_to_pb(report: HandoffReport) -> pb.HandoffReport:
    return pb.HandoffReport(**fields_of(report))


def handoff_report_from_pb(message: pb.HandoffReport) -> HandoffReport:
    """Raises ValueError for times that no clock shows."""
    report = from_fields(HandoffReport, message)
    if not all(0.0 <= value < inf for value in (getattr(report, name) for name in _TIMES)):
        raise ValueError("a handoff that took no possible time")
    return report


def output_to_pb(output: Output) -> pb.Output:
    """Runs once a token and sequence: fields that are mostly empty are set only when they are not."""
    message = pb.Output(
        request_id=output.request_id, position=output.position, token_ids=output.token_ids, text=output.text
    )
    if output.logprobs:
        message.logprobs.extend([token_logprob_to_pb(entry) for entry in output.logprobs])
    if output.finish_reason is not None:
        message.finish_reason = output.finish_reason.value
        message.message = output.message
        if isinstance(output.stop_reason, str):
            message.stop_text = output.stop_reason
        elif output.stop_reason is not None:
            message.stop_token_id = output.stop_reason
        if output.refusal is not None:
            message.refusal = output.refusal.value
    if output.cached_tokens:
        message.cached_tokens = output.cached_tokens
    if output.prompt_logprobs:
        message.prompt_logprobs.extend([scores_to_pb(part) for part in output.prompt_logprobs])
    if output.handoff is not None:
        message.handoff.CopyFrom(handoff_report_to_pb(output.handoff))
    return message


def output_from_pb(message: pb.Output) -> Output:
    """Runs once a token and sequence: most outputs are a token and its text."""
    ids = message.token_ids
    token_ids = (ids[0],) if len(ids) == 1 else tuple(ids)
    finish, position = message.finish_reason, message.position
    if not (finish or position == 0 or message.logprobs or message.prompt_logprobs or message.HasField("handoff")):
        name, text, cached = message.request_id, message.text, message.cached_tokens
        return make_tuple(Output, (name, position, token_ids, text, (), None, None, None, "", cached, (), None))
    return Output(
        request_id=message.request_id,
        position=position,
        token_ids=token_ids,
        text=message.text,
        logprobs=tuple(token_logprob_from_pb(entry) for entry in message.logprobs) if message.logprobs else (),
        finish_reason=FinishReason(finish) if finish else None,
        stop_reason=_stop_reason(message) if finish else None,
        refusal=refusal_from_name(message.refusal) if finish and message.refusal else None,
        message=message.message if finish else "",
        cached_tokens=message.cached_tokens,
        prompt_logprobs=tuple([scores_from_pb(part) for part in message.prompt_logprobs]),
        handoff=handoff_report_from_pb(message.handoff) if message.HasField("handoff") else None,
    )


def _stop_reason(message: pb.Output) -> str | int | None:
    if message.HasField("stop_text"):
        return message.stop_text
    return message.stop_token_id if message.HasField("stop_token_id") else None


def refusal_from_name(name: str) -> Refusal:
    """A name that a newer peer made up counts as INTERNAL, so that a rolling upgrade cannot break a stream."""
    try:
        return Refusal(name)
    except ValueError:
        return Refusal.INTERNAL
