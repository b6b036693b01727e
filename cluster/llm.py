"""Offline generation: one engine in this process, no network and no Ray; prompts and parameters are read by the HTTP API's rules."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from tqdm import tqdm

from cluster.aliases import BLOCKS, BY_KEYWORD, check_kv_dtype, kv_bytes, read_dtype, settings_of
from cluster.hub import HubConfig, fetch, is_repository
from cluster.preflight import check_model
from cluster.settings import build, lay
from router.api.beam_requests import Searches
from router.api.grammar_check import check_job
from router.api.prompts import Prompt, read_chat, read_prompts
from router.api.schema import CompletionBody, read_fields
from router.api.translate import make_job
from router.config import ApiConfig
from workers import request
from workers.config import WorkerConfig
from workers.errors import BatonError, InvalidConfig, InvalidRequest, Refusal
from workers.model.loading import ServedModel
from workers.request import Output, Request
from workers.token_logprobs import TokenLogprob
from workers.worker import make_engine

__all__ = ["LLM", "BeamSearchParams", "Completion", "PromptCompletions", "SamplingParams"]

Message = Mapping[str, Any]

_MANY = 1 << 30
_BOUNDS = ApiConfig(
    max_n=_MANY, max_prompts=_MANY, max_choices=_MANY, max_prompt_scores=_MANY, max_alternatives=_MANY,
    max_beam_tokens=1 << 62,
)  # fmt: skip
"""Whoever calls has the process for himself."""
_DEFAULT_TOKENS = 16
"""Of a prompt whose max_tokens is None; a conversation takes what room there is. Both as over HTTP."""


@dataclass(frozen=True)
class SamplingParams(request.SamplingParams):
    """As workers.request.SamplingParams, and what an answer is to be: the fields of a request body of the same names, of which one is set."""

    structured_outputs: Mapping[str, Any] | None = None
    """{"json": schema}, {"regex": ...}, {"choice": [...]}, {"grammar": ...} or {"structural_tag": ...}"""
    response_format: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """As the fields of a request body of the same names; see router.api.beams.BeamPlan. `beam_width` beams come back."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None


@dataclass(slots=True)
class Completion:
    """One choice. `logprobs` has one entry a token when asked for; `cumulative_logprob` is their sum, of a beam."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class PromptCompletions:
    """A prompt and its choices."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None


class LLM:
    """Loads a "-PT" checkpoint, from a folder or, as OWNER/NAME, from the Hugging Face Hub, and generates.

    `settings` are fields of workers.config.WorkerConfig, such as dtype, kv_memory_bytes, max_num_seqs or num_threads, or the names
    that vLLM and FastDeploy have for them (docs/aliases.md), such as tensor_parallel_size or num_gpu_blocks_override.
    Raises InvalidConfig when the model cannot be loaded. Several threads may call it: one call runs after the other. A call
    that raised or was interrupted leaves nothing behind.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self._config = build(WorkerConfig, _read_settings(model, settings), "worker")
        if self._config.parallel.size > 1:
            raise InvalidConfig("LLM computes in this process alone: a model over several ranks needs `baton serve`")
        check_model(self._config.model)
        self._model = ServedModel.load(self._config)
        self._engine = make_engine(self._config, self._model)
        self._lock = threading.Lock()
        """Held by the call whose sequences are in the engine."""
        self._next_id = 0

    @property
    def tokenizer(self) -> Any:
        return self._model.tokenizer

    def generate(
        self,
        prompts: str | Iterable[str] | Sequence[int] | Iterable[Sequence[int]],
        params: request.SamplingParams | Sequence[request.SamplingParams] | None = None,
        *,
        n: int = 1,
        progress: bool = True,
    ) -> list[PromptCompletions]:
        """Completes prompts (texts or token ids), `n` choices each, in the order given.

        `params` is one SamplingParams for all or one a prompt; their fields may be spelled as in a request body, such as
        `stop="END"`. Raises InvalidRequest before anything runs.
        """
        return self._generate(self._read(prompts), params, n, progress, _DEFAULT_TOKENS, "prompt")

    def beam_search(
        self,
        prompts: str | Iterable[str] | Sequence[int] | Iterable[Sequence[int]],
        params: BeamSearchParams,
        *,
        progress: bool = True,
    ) -> list[PromptCompletions]:
        """The best beams of each prompt (texts or token ids), the best first. Raises InvalidRequest before anything runs."""
        read, wanted = self._read(prompts), asdict(params)
        if not read:
            return []
        body = read_fields(CompletionBody, {**wanted, "prompt": None, "use_beam_search": True, "n": params.beam_width})
        info, tokenizer = self._model.info, self._model.tokenizer
        job = make_job(body, info, tokenizer, _BOUNDS, read, "prompt", _DEFAULT_TOKENS, params.logprobs)
        assert job.beams is not None
        for one in job.requests:
            self._engine.check(one)
        searches = Searches(job.beams, job.requests, params.logprobs or 0)
        with self._lock, tqdm(total=params.max_tokens, disable=not progress, unit="tok", dynamic_ncols=True) as bar:
            while asked := searches.ask():
                generation, scored = PromptCompletions(None, [], []), [Completion(0) for _ in asked]
                self._run([(one, generation, own) for one, own in zip(asked, scored, strict=True)], progress=False)
                searches.advance([own.logprobs[0] for own in scored])
                bar.update()
        outputs, logprobs = searches.outputs(tokenizer, info.max_model_len), searches.logprobs
        told = [
            Completion(
                number % params.beam_width, output.text, list(output.token_ids), list(output.logprobs),
                str(output.finish_reason), output.stop_reason, logprob,
            )
            for number, (output, logprob) in enumerate(zip(outputs, logprobs, strict=True))
        ]  # fmt: skip
        return [
            PromptCompletions(prompt.text, list(prompt.token_ids), told[place * job.n : (place + 1) * job.n])
            for place, prompt in enumerate(read)
        ]

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: request.SamplingParams | Sequence[request.SamplingParams] | None = None,
        *,
        n: int = 1,
        progress: bool = True,
        add_generation_prompt: bool = True,
        **template_settings: Any,
    ) -> list[PromptCompletions]:
        """Answers one conversation (a list of messages) or several, through the model's chat template.

        Raises InvalidRequest before anything runs.
        """
        several = _listed(conversations, "conversations")
        if several and isinstance(several[0], Mapping):
            several = [several]
        read = []
        for messages in several:
            listed = _listed(messages, "messages")
            if not all(isinstance(message, Mapping) for message in listed):
                raise InvalidRequest("messages must be mappings with role and content", "messages")
            plain = [dict(message) for message in listed]
            read.append(
                read_chat(
                    plain,
                    self._model.tokenizer,
                    self._model.info,
                    add_generation_prompt,
                    False,
                    template_settings,
                    False,
                )
            )
        return self._generate(read, params, n, progress, self._model.info.max_model_len, "messages")

    def _read(self, prompts: str | Iterable[str] | Sequence[int] | Iterable[Sequence[int]]) -> list[Prompt]:
        """Texts or token ids, one or several. Raises InvalidRequest."""
        asked = [prompts] if isinstance(prompts, str) else _listed(prompts, "prompts")
        if asked and isinstance(asked[0], int):
            asked = [asked]
        info, tokenizer = self._model.info, self._model.tokenizer
        return [
            prompt
            for one in asked
            for prompt in read_prompts(list(one) if isinstance(one, tuple) else one, tokenizer, info, True)
        ]

    def _generate(
        self,
        prompts: list[Prompt],
        params: request.SamplingParams | Sequence[request.SamplingParams] | None,
        n: int,
        progress: bool,
        default_tokens: int,
        param: str,
    ) -> list[PromptCompletions]:
        """Reads each prompt's parameters as an HTTP body's, then runs all of them."""
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidRequest(
                f"{len(prompts)} prompts need one SamplingParams or as many, not {len(each)}", "params"
            )
        answers, requests = [], []
        for prompt, own in zip(prompts, each, strict=True):
            answer = PromptCompletions(prompt.text, list(prompt.token_ids), [Completion(index) for index in range(n)])
            answers.append(answer)
            body = _as_body(own, n)
            answer.prompt_logprobs = None if own.prompt_logprobs is None else [None]
            info, tokenizer = self._model.info, self._model.tokenizer
            job = make_job(body, info, tokenizer, _BOUNDS, [prompt], param, default_tokens, body.logprobs)
            vocabulary, wanted = self._model.vocabulary, job.speech.wanted
            if wanted is not None and vocabulary and (problem := check_job(job, wanted, vocabulary)):
                raise InvalidRequest(problem, wanted.param)
            for one, choice in zip(job.requests, answer.outputs, strict=True):
                self._engine.check(one)
                requests.append((one, answer, choice))
        with self._lock:
            self._run(requests, progress)
        return answers

    def _run(self, requests: list[tuple[Request, PromptCompletions, Completion]], progress: bool) -> None:
        """Steps until all are done; whatever ends it early, what is left is cancelled and leaves the engine usable."""
        owners: dict[int, tuple[Request, PromptCompletions, Completion]] = {}
        num_tokens = 0
        try:
            for owner in requests:
                self._next_id += 1
                owners[self._next_id] = owner
                self._engine.add(self._next_id, owner[0])
            with tqdm(total=len(requests), disable=not progress, unit="req", dynamic_ncols=True) as bar:
                while self._engine.has_work:
                    for sequence_id, output in self._engine.step().outputs:
                        num_tokens += len(output.token_ids)
                        if sequence_id in owners and self._absorb(owners[sequence_id], output):
                            bar.set_postfix_str(f"{num_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
                            bar.update()
                    if self._engine.made_no_progress:
                        self._engine.rest(timeout_s=0.1)
        finally:
            for sequence_id in owners:
                self._engine.cancel(sequence_id)
            self._engine.take_early()  # what an interrupted step had to say belongs to nobody any more

    def _absorb(self, owner: tuple[Request, PromptCompletions, Completion], output: Output) -> bool:
        """Adds an output to its choice; True when the choice has ended."""
        _, answer, choice = owner
        choice.text += output.text
        choice.token_ids += output.token_ids
        choice.logprobs += output.logprobs
        for part in output.prompt_logprobs:
            assert answer.prompt_logprobs is not None
            answer.prompt_logprobs[part.first :] = list(part)
        if output.finish_reason is None:
            return False
        if output.refusal is not None:
            raise BatonError(f"{Refusal(output.refusal)}: {output.message}")
        choice.finish_reason, choice.stop_reason = output.finish_reason.value, output.stop_reason
        return True


def _read_settings(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a worker: those given, what aliases among them stand for, and the folder of a model that is named as a repository.
    Raises InvalidConfig."""
    own = {name: value for name, value in given.items() if name not in BY_KEYWORD}
    if "dtype" in own and (dtype := read_dtype(own.pop("dtype"))) is not None:
        own["dtype"] = dtype
    laid, notes = settings_of({name: value for name, value in given.items() if name in BY_KEYWORD})
    hub: dict[str, Any] = {}
    for setting, value in laid.items():
        group, *path = setting.split(".")
        if group == "worker":
            own = lay(own, path, value)
        elif group == "hub":
            hub = lay(hub, path, value)
        else:
            notes.append(f"{setting} is of a cluster, and changes nothing in LLM")
    for note in notes:
        warnings.warn(note, stacklevel=3)
    own = {"model": model, "max_queue": _MANY, **own}
    if is_repository(model):
        own = {**own, "model": fetch(model, build(HubConfig, hub, "hub"))}
        own["served_model_name"] = own.get("served_model_name") or model
    check_kv_dtype(given, str(own.get("dtype", "float32")))
    if (blocks := given.get(BLOCKS.replace("-", "_"))) is not None:
        own["kv_memory_bytes"] = kv_bytes(own["model"], own.get("dtype", "float32"), 1, blocks)
    return own


def _listed(value: Any, what: str) -> list[Any]:
    """A list of what a caller gave as any iterable. Raises InvalidRequest."""
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{what} must be a list, not {type(value).__name__}", what)
    return list(value)


def _as_body(params: request.SamplingParams, n: int) -> CompletionBody:
    """The request body that asks for these parameters. Raises InvalidRequest naming a field of a wrong type."""
    if not isinstance(params, request.SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams, not {type(params).__name__}", "params")
    content = {field.name: _as_json(getattr(params, field.name)) for field in fields(params)}
    for name in ("grammar", "thinking"):
        if content.pop(name):
            raise InvalidRequest(f"{name} is not set by callers: use structured_outputs", name)
    content["include_stop_str_in_output"] = content.pop("include_stop")
    try:
        pairs = params.logit_bias.items() if isinstance(params.logit_bias, Mapping) else params.logit_bias
        content["logit_bias"] = {str(token): bias for token, bias in pairs}
    except (TypeError, ValueError):
        raise InvalidRequest(
            "logit_bias must be a mapping of token ids to biases, or such pairs", "logit_bias"
        ) from None
    if len(content["logit_bias"]) != len(params.logit_bias):
        raise InvalidRequest("logit_bias must not name a token twice", "logit_bias")
    return read_fields(CompletionBody, {**content, "prompt": None, "n": n})


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, (tuple, list)) else value
