"""One generation request, its parameters, and what comes back; plain data, no behaviour beyond validation."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from workers.errors import InvalidRequest, Refusal, Refused
from workers.limits import DEFAULT_LIMITS, RequestLimits
from workers.token_logprobs import PromptScores, TokenLogprob

MAX_GRAMMAR_CHARACTERS = 128 << 10
"""Of a request's grammar; reading one takes longer the longer it is."""
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """When this many tokens have come without `end_token_id` among them, `closing` follows, token by token, whatever else is likely.

    `closing` holds `end_token_id`. With `start_token_id` that holds for outputs that begin with it, which does not count.
    """

    num_tokens: int
    end_token_id: int
    closing: tuple[int, ...]
    start_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one choice are drawn, and when they end.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch those filters off. `seed` None means "any":
    it is made concrete (`with_seed`) before a request enters the system, so that a re-run draws the same tokens.
    `logprobs` None: off; k: the drawn token's logprob and the k most likely ones (0 <= k <= limits.logprobs), or in place of
    these the tokens in `logprob_token_ids`.
    `bad_words` are token id sequences that must not appear. `logit_bias` is (token id, bias) pairs.
    `grammar` is what the output is, in the language of workers.grammar; empty: anything. `allowed_token_ids`, when there are
    any, are all that may be drawn, and those that end the output. Where a grammar leaves a single way to go on, it outranks
    allowed_token_ids, bad_words, min_tokens and ignore_eos; `thinking` outranks all.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""
    allowed_token_ids: tuple[int, ...] = ()
    thinking: ThinkingBudget | None = None
    logprob_token_ids: tuple[int, ...] = ()

    @property
    def alternatives(self) -> int | tuple[int, ...] | None:
        """Those whose logprobs come with each token: so many of the most likely ones, or these tokens; None: no logprobs."""
        return None if self.logprobs is None else self.logprob_token_ids or self.logprobs

    @property
    def is_constrained(self) -> bool:
        """Whether some draws are among less than all tokens."""
        return bool(self.grammar or self.allowed_token_ids or self.thinking)

    def validate(self, vocab_size: int, limits: RequestLimits = DEFAULT_LIMITS) -> None:
        """Raises InvalidRequest naming the first field that is out of range."""
        checks: Sequence[tuple[bool, str, str]] = (
            (self.max_tokens >= 1, "max_tokens", "must be at least 1"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be between 0 and max_tokens"),
            (math.isfinite(self.temperature) and 0 <= self.temperature <= 2, "temperature", "must be between 0 and 2"),
            (0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k", "must be 0 (off) or positive"),
            (0 <= self.min_p <= 1, "min_p", "must be between 0 and 1"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", "must be between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", "must be between -2 and 2"),
            (0 < self.repetition_penalty <= 100, "repetition_penalty", "must be above 0 and at most 100"),
            (self.seed is None or INT64_MIN <= self.seed <= INT64_MAX, "seed", "must fit in a signed 64-bit integer"),
            (len(self.stop) <= limits.stop_strings, "stop", f"takes at most {limits.stop_strings} strings"),
            (
                sum(map(len, self.stop)) <= limits.stop_characters,
                "stop",
                f"takes at most {limits.stop_characters} characters in all its strings together",
            ),
            (
                len(self.stop_token_ids) <= limits.stop_token_ids,
                "stop_token_ids",
                f"takes at most {limits.stop_token_ids} tokens",
            ),
            (  # a word that is given as text stands here twice: as it begins a text and as it follows a blank
                len(self.bad_words) <= 2 * limits.bad_words,
                "bad_words",
                f"takes at most {2 * limits.bad_words} sequences of tokens",
            ),
            (
                sum(map(len, self.bad_words)) <= limits.bad_word_tokens,
                "bad_words",
                f"takes at most {limits.bad_word_tokens} tokens in all its words together",
            ),
            (len(self.logit_bias) <= limits.logit_bias, "logit_bias", f"takes at most {limits.logit_bias} tokens"),
            (
                len({token for token, _ in self.logit_bias}) == len(self.logit_bias),
                "logit_bias",
                "must not name a token twice",
            ),
            (all(self.stop), "stop", "must not contain an empty string"),
            (
                len(self.grammar) <= MAX_GRAMMAR_CHARACTERS,
                "grammar",
                f"takes at most {MAX_GRAMMAR_CHARACTERS} characters, a schema's included",
            ),
            (
                len(self.allowed_token_ids) <= limits.allowed_token_ids
                and all(0 <= token < vocab_size for token in self.allowed_token_ids),
                "allowed_token_ids",
                f"takes at most {limits.allowed_token_ids} token ids below {vocab_size}",
            ),
            (
                self.thinking is None or _is_sound(self.thinking, vocab_size),
                "thinking_token_budget",
                "must be at least 0, and needs tokens that end the reasoning",
            ),
            (
                self.logprobs is None or 0 <= self.logprobs <= limits.logprobs,
                "logprobs",
                f"must be between 0 and {limits.logprobs}",
            ),
            (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= limits.logprobs,
                "prompt_logprobs",
                f"must be between 0 and {limits.logprobs}",
            ),
            (
                len(self.logprob_token_ids) <= limits.logprobs
                and len(set(self.logprob_token_ids)) == len(self.logprob_token_ids)
                and all(0 <= token < vocab_size for token in self.logprob_token_ids),
                "logprob_token_ids",
                f"takes at most {limits.logprobs} different token ids below {vocab_size}",
            ),
            (not self.logprob_token_ids or self.logprobs is not None, "logprob_token_ids", "needs logprobs"),
            (
                all(0 <= token < vocab_size and -100 <= bias <= 100 for token, bias in self.logit_bias),
                "logit_bias",
                f"needs token ids below {vocab_size} and biases between -100 and 100",
            ),
            (
                all(0 <= token < vocab_size for token in self.stop_token_ids),
                "stop_token_ids",
                f"needs token ids below {vocab_size}",
            ),
            (
                all(words and all(0 <= token < vocab_size for token in words) for words in self.bad_words),
                "bad_words",
                f"needs non-empty words of token ids below {vocab_size}",
            ),
        )
        for ok, param, what in checks:
            if not ok:
                raise InvalidRequest(f"{param} {what}", param)

    def with_seed(self, seed: int) -> SamplingParams:
        """These params with `seed` filled in where the caller left it open."""
        return self if self.seed is not None else replace(self, seed=seed)


def _is_sound(budget: ThinkingBudget, vocab_size: int) -> bool:
    is_known = all(0 <= token < vocab_size for token in budget.closing)
    return budget.num_tokens >= 0 and len(budget.closing) <= 64 and budget.end_token_id in budget.closing and is_known


@dataclass(frozen=True, slots=True)
class Request:
    """One choice to generate. A client request with n choices becomes n of these.

    `replay_token_ids` are output tokens that the client already has (its first worker was lost, or it was
    preempted): they are fed again one by one through the decode path, never re-sampled and never re-emitted.
    `params.seed` is concrete.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    choice_index: int = 0
    replay_token_ids: tuple[int, ...] = ()
    priority: int = 0
    """Lower runs first."""
    traceparent: str = ""
    """W3C trace context that spans of this request hang below; decides nothing."""
    cache_salt: int = 0
    """Unsigned 64 bit. Prompts with different salts share no cached block, in no tier and from no peer: tenants have one each."""

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log message about it carries, as `extra`."""
        return {"request_id": self.request_id, "traceparent": self.traceparent}


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"
    MOVED = "moved"
    """Not the request's end: it goes on at another worker from `position`. Said to a router, never to a client."""


@dataclass(frozen=True, slots=True)
class HandoffReport:
    """How one request's prompt was computed; measured, and sent with its first output.

    `prefill_worker` equals the decode worker when the prompt was computed locally (transport "local").
    """

    prefill_worker: str
    decode_worker: str
    transport: str
    kv_bytes: int = 0
    transfer_s: float = 0.0
    """While pieces were on their way or being verified."""
    prefill_s: float = 0.0
    attempts: int = 1
    """Workers that were asked to compute the prompt, this one included."""
    wait_s: float = 0.0
    """From opening the handoff to the first piece."""
    exposed_s: float = 0.0
    """From the sender's word that all is computed to the last piece in its place: what the handoff adds to the first token."""
    resends: int = 0
    """Pieces that had to be sent again."""
    degradations: int = 0
    """Times the transport was changed in mid-transfer."""
    recovery: str = ""
    """How the last fault was answered (workers.handoff.protocol.choices.Recovery); empty: there was none."""
    queue_s: float = 0.0
    """From submission until the decode worker had room."""


class Output(NamedTuple):
    """What one engine step adds to one request. A tuple, because one is made for every token, here and at its router: making a
    frozen dataclass takes five times as long.

    `position` is the index of token_ids[0] among the request's output tokens: a receiver refuses a gap or a repeat.
    A replay that turns out to be complete is answered with no token and a finish_reason; with finish_reason ERROR,
    `position` and `token_ids` mean nothing.
    `text` may be empty (an unfinished UTF-8 character or a possible stop string is held back) and is a pure
    function of the tokens so far. `logprobs` has one entry a token when asked for. The last output has
    `finish_reason`; with ERROR, `refusal` and `message` say why. `stop_reason` is the stop string or
    token id that ended it, None for EOS. `handoff` comes once, with the first token.
    """

    request_id: str
    position: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    refusal: Refusal | None = None
    message: str = ""
    cached_tokens: int = 0
    """Prompt tokens served from a prefix cache (with the first token)."""
    prompt_logprobs: tuple[PromptScores, ...] = ()
    """Parts of at most MAX_SCORES tokens; they come in order, all of them before or with the first token."""
    handoff: HandoffReport | None = None


make_tuple = tuple.__new__
"""A named tuple of a class from all of its fields in their order: half the time of a call of the class, and nothing is checked."""


def merged(outputs: Collection[Output]) -> Output:
    """One output that says what several in a row say; each is copied once."""
    several = tuple(outputs)
    first, last = several[0], several[-1]
    return Output(
        request_id=first.request_id,
        position=first.position,
        token_ids=tuple([token_id for output in several for token_id in output.token_ids]),
        text="".join([output.text for output in several]),
        logprobs=tuple([entry for output in several for entry in output.logprobs]),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        refusal=last.refusal,
        message=last.message,
        cached_tokens=next((output.cached_tokens for output in several if output.cached_tokens), 0),
        prompt_logprobs=tuple([part for output in several for part in output.prompt_logprobs]),
        handoff=next((output.handoff for output in several if output.handoff is not None), None),
    )


def end_output(request_id: str, refusal: Refusal, message: str) -> Output:
    """The output that ends a request which was refused or given up."""
    return Output(request_id, 0, finish_reason=FinishReason.ERROR, refusal=refusal, message=message)


def error_output(request: Request, refusal: Refusal, message: str) -> Output:
    """As end_output."""
    return end_output(request.request_id, refusal, message)


def refusal_output(request: Request, error: InvalidRequest | Refused) -> Output:
    """As error_output, for what was raised."""
    refusal = Refusal.INVALID if isinstance(error, InvalidRequest) else error.refusal
    return error_output(request, refusal, str(error))
