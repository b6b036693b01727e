"""Offline generation: one engine in this process, no network and no Ray."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from workers.config import WorkerConfig
from workers.errors import BatonError, InvalidConfig, Refusal
from workers.loaded import Checkpoint
from workers.request import Output, Request, SamplingParams, TokenLogprob
from workers.worker import make_engine

__all__ = ["LLM", "Completion", "Generation", "SamplingParams"]

Message = Mapping[str, Any]


@dataclass(slots=True)
class Completion:
    """One choice. `logprobs` has one entry a token when asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Generation:
    """A prompt and its choices."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None


class LLM:
    """Loads a "-PT" checkpoint and generates.

    `settings` are fields of workers.config.WorkerConfig, such as dtype, kv_memory_bytes, max_num_seqs or num_threads.
    Raises InvalidConfig when the model cannot be loaded.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self._config = WorkerConfig(model=model, max_queue=1 << 30, **settings)
        if self._config.parallel.size > 1:
            raise InvalidConfig("LLM computes in this process alone: a model over several ranks needs `baton serve`")
        self._checkpoint = Checkpoint.load(self._config)
        self._engine = make_engine(self._config, self._checkpoint)
        self._next_id = 0

    @property
    def tokenizer(self) -> Any:
        return self._checkpoint.tokenizer

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        progress: bool = True,
    ) -> list[Generation]:
        """Completes prompts (texts or token ids), `n` choices each, in the order given.

        `params` is one SamplingParams for all or one a prompt. Raises InvalidRequest before anything runs.
        """
        texts, token_ids = self._tokenize(prompts)
        each = [params or SamplingParams()] * len(token_ids) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(token_ids):
            raise BatonError(f"{len(token_ids)} prompts need one SamplingParams or as many, not {len(each)}")
        generations = [
            Generation(text, ids, [Completion(index) for index in range(n)])
            for text, ids in zip(texts, token_ids, strict=True)
        ]
        requests: list[tuple[Request, Generation, Completion]] = []
        for generation, own in zip(generations, each, strict=True):
            concrete = own.with_seed(random.getrandbits(63))
            generation.prompt_logprobs = None if own.prompt_logprobs is None else [None]
            for choice in generation.outputs:
                request = Request(str(self._next_id), tuple(generation.prompt_token_ids), concrete, choice.index)
                self._engine.check(request)
                requests.append((request, generation, choice))
                self._next_id += 1
        self._run(requests, progress)
        return generations

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        progress: bool = True,
        **template_settings: Any,
    ) -> list[Generation]:
        """Answers one conversation (a list of messages) or several, through the model's chat template."""
        several = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        prompts = [
            self._checkpoint.tokenizer.apply_chat_template([dict(m) for m in messages], **template_settings)  # type: ignore[arg-type]
            for messages in several
        ]
        return self.generate(prompts, params, n=n, progress=progress)

    def _tokenize(self, prompts: Any) -> tuple[list[str | None], list[list[int]]]:
        encode = self._checkpoint.tokenizer.encode
        if isinstance(prompts, str):
            return [prompts], [encode(prompts)]
        if prompts and isinstance(prompts[0], int):
            return [None], [list(prompts)]
        texts = [p if isinstance(p, str) else None for p in prompts]
        return texts, [encode(p) if isinstance(p, str) else list(p) for p in prompts]

    def _run(self, requests: list[tuple[Request, Generation, Completion]], progress: bool) -> None:
        """Steps until all are done; an interrupt cancels what is left and leaves the engine usable."""
        for index, (request, _, _) in enumerate(requests):
            self._engine.add(index, request)
        num_tokens = 0
        try:
            with tqdm(total=len(requests), disable=not progress, unit="req", dynamic_ncols=True) as bar:
                while self._engine.has_work:
                    for index, output in self._engine.step().outputs:
                        num_tokens += len(output.token_ids)
                        if self._absorb(requests[index], output):
                            bar.set_postfix_str(f"{num_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
                            bar.update()
                    if self._engine.made_no_progress:
                        self._engine.rest(timeout_s=0.1)
        finally:
            for index in range(len(requests)):
                self._engine.cancel(index)
            self._engine.take_early()  # what an interrupted step had to say belongs to nobody any more

    def _absorb(self, owner: tuple[Request, Generation, Completion], output: Output) -> bool:
        """Adds an output to its choice; True when the choice has ended."""
        _, generation, choice = owner
        choice.text += output.text
        choice.token_ids += output.token_ids
        choice.logprobs += output.logprobs
        for part in output.prompt_logprobs:
            assert generation.prompt_logprobs is not None
            generation.prompt_logprobs[part.first :] = list(part)
        if output.finish_reason is None:
            return False
        if output.refusal is not None:
            raise BatonError(f"{Refusal(output.refusal)}: {output.message}")
        choice.finish_reason, choice.stop_reason = output.finish_reason.value, output.stop_reason
        return True
