"""Reads what a body says of beams, asks for their next tokens as requests of one token each, and tells the best as outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from router.api.beams import Beam, BeamPlan, BeamSearch
from router.api.schema import GenerationBody
from workers.errors import InvalidRequest
from workers.kv_cache.block_hash import PromptTokens
from workers.request import FinishReason, Output, Request, SamplingParams
from workers.status import ModelInfo
from workers.text.output import OutputState
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer
from workers.token_logprobs import TokenLogprob

_MAX_PENALTY = 10.0
_LEFT_OUT = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids", "stop", "min_tokens",
    "logprob_token_ids", "prompt_logprobs",
)  # fmt: skip


def without_sampling(body: GenerationBody, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What those fields are to be that beams are not scored by: they go by the model's own probabilities, whatever a deployment sets
    by default. `fields`: what was read of SamplingParams. Raises InvalidRequest."""
    plain = SamplingParams()
    for name in _LEFT_OUT:
        asked = getattr(body, name)
        if asked not in (None, [], {}) and asked != getattr(plain, name):
            raise InvalidRequest(f"use_beam_search goes by the model's own probabilities: leave {name} out", name)
    if fields.get("prompt_logprobs") is not None:
        raise InvalidRequest("use_beam_search tells no logprobs of the prompt: leave echo out, or logprobs", "echo")
    if fields.get("grammar") or fields.get("thinking"):
        asked_for = "the form of the answer, or of calls," if fields.get("grammar") else "the length of reasoning"
        raise InvalidRequest(f"use_beam_search cannot be had where {asked_for} is enforced", "use_beam_search")
    return {name: getattr(plain, name) for name in _LEFT_OUT}


def read_plan(
    body: GenerationBody, requests: Sequence[Request], width: int, info: ModelInfo, tokenizer: Tokenizer, most: int
) -> BeamPlan | None:
    """None: no beams are asked for. `requests`: `width` of each prompt. `most`: what all searches of one job together may take
    (ApiConfig.max_beam_tokens). Raises InvalidRequest."""
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    if not body.use_beam_search:
        for name, is_set in (
            ("beam_width", body.beam_width is not None),
            ("length_penalty", penalty != 1.0),
            ("early_stopping", bool(body.early_stopping)),
        ):
            if is_set:
                raise InvalidRequest(f"{name} needs use_beam_search: true", name)
        return None
    if body.stream:
        raise InvalidRequest("beams cannot be streamed: the best one is known when all have ended", "stream")
    if not -_MAX_PENALTY <= penalty <= _MAX_PENALTY:
        raise InvalidRequest(f"length_penalty must be between {-_MAX_PENALTY} and {_MAX_PENALTY}", "length_penalty")
    params = requests[0].params
    max_tokens = min(request.params.max_tokens for request in requests)
    ends = frozenset() if params.ignore_eos else tokenizer.eos_token_ids
    plan = BeamPlan(width, max_tokens, ends | set(params.stop_token_ids), float(penalty), body.early_stopping or False)
    if plan.num_alternatives > (known := min(info.limits.logprobs, info.vocab_size)):
        raise InvalidRequest(
            f"beam_width is at most {known - len(plan.end_token_ids)} here: of each token so many alternatives are needed, and as many as "
            f"there are tokens that end a text, and worker.limits.logprobs allows {known}",
            "beam_width",
        )
    if (work := sum(max_tokens * (len(request.prompt_token_ids) + max_tokens) for request in requests)) > most:
        raise InvalidRequest(
            f"beam_width times max_tokens times the tokens of prompt and answer is {work} here, of all prompts together, and at most "
            f"{most} (router.api.max_beam_tokens): ask for fewer max_tokens, a smaller beam_width or fewer prompts",
            "max_tokens",
        )
    return plan


class Searches:
    """The searches of one job, one a prompt, round by round."""

    def __init__(self, plan: BeamPlan, requests: Sequence[Request], num_top: int = 0) -> None:
        """`requests`: `width` of each prompt, which say what its beams are to be asked with. `num_top` alternatives are to be told."""
        self.width = plan.width
        self._requests = requests
        self._num_top = max(num_top, plan.num_alternatives)
        self._searches = [BeamSearch(plan) for _ in requests[:: plan.width]]
        self.num_rounds = 0
        """That are over."""

    @property
    def num_bytes(self) -> int:
        """Of the prompts that `ask` would make."""
        lengths = [len(first.prompt_token_ids) + self.num_rounds for first in self._requests[:: self.width]]
        return sum(4 * length * len(search.open) for length, search in zip(lengths, self._searches, strict=True))

    def ask(self) -> tuple[Request, ...]:
        """One request for each open beam; its only token's alternatives are what is wanted. None: all searches are over."""
        asked: list[Request] = []
        for place, search in enumerate(self._searches):
            first = self._requests[place * self.width]
            params = replace(
                first.params, max_tokens=1, temperature=0.0, ignore_eos=True, stop_token_ids=(), logprobs=self._num_top
            )
            asked += [
                replace(
                    first,
                    request_id=f"{first.request_id}-{self.num_rounds}-{number}",
                    prompt_token_ids=PromptTokens((*first.prompt_token_ids, *beam.token_ids)),
                    params=params,
                )
                for number, beam in enumerate(search.open)
            ]
        for request in asked:
            assert isinstance(request.prompt_token_ids, PromptTokens)
            _ = request.prompt_token_ids.packed  # here, because this may be a thread
        return tuple(asked)

    @property
    def num_scores(self) -> int:
        """Alternatives that `advance` chooses from."""
        return self._num_top * sum(len(search.open) for search in self._searches)

    @property
    def num_tokens(self) -> int:
        """Of all of `outputs`."""
        return sum(len(beam.tokens) for search in self._searches for beam in search.best)

    def advance(self, scores: Sequence[TokenLogprob]) -> None:
        """What came for each request of the last `ask`, in order."""
        self.num_rounds += 1
        rest = iter(scores)
        for search in self._searches:
            if search.open:
                search.advance([next(rest).top for _ in search.open])

    @property
    def logprobs(self) -> list[float]:
        """Of each of `outputs`: the sum of its tokens' log-probabilities."""
        return [beam.logprob for search in self._searches for beam in search.best]

    def outputs(self, tokenizer: Tokenizer, max_len: int) -> list[Output]:
        """Of each of the requests that the searches began with: its beam, the best of a prompt first."""
        best = [beam for search in self._searches for beam in search.best]
        return [_told(beam, request, tokenizer, max_len) for beam, request in zip(best, self._requests, strict=True)]


def _told(beam: Beam, request: Request, tokenizer: Tokenizer, max_len: int) -> Output:
    params = request.params
    detokenizer = IncrementalDetokenizer(tokenizer, request.prompt_token_ids[-4:], params.skip_special_tokens)
    state = OutputState(request, detokenizer, tokenizer.eos_token_ids, max_len)
    told = [state.push(token_id) for token_id in beam.token_ids]
    return Output(
        request.request_id,
        0,
        beam.token_ids,
        "".join([one.text for one in told]),
        () if params.logprobs is None else beam.tokens,
        told[-1].finish_reason or FinishReason.LENGTH,
        told[-1].stop_reason,
    )
