"""Requests with the tokens they must give, as one engine in this process gives them; knows no cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster_process import MODEL

EXTRA = {"ignore_eos": True, "return_token_ids": True, "trace": True, "top_k": 0, "min_p": 0.0}


@dataclass(frozen=True, slots=True)
class Job:
    """One request in the terms of the completions API, and its golden tokens."""

    body: dict[str, Any]
    golden: list[int]
    text: str


def _body(prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """In the terms of the openai client, which knows no structured_outputs."""
    own = {name: value for name, value in sampling.items() if name == "structured_outputs"}
    known = {name: value for name, value in sampling.items() if name not in own}
    return {"model": MODEL.name, "prompt": prompt, **known, "extra_body": EXTRA | own}


def golden_jobs(asked: Sequence[tuple[list[int], dict[str, Any]]], **settings: Any) -> list[Job]:
    """Runs prompts, each with its own sampling fields (max_tokens, seed, ...), to their bounds. `settings` are those of LLM."""
    from cluster.llm import LLM, SamplingParams

    llm = LLM(str(MODEL), **settings)
    params = [SamplingParams(ignore_eos=True, **sampling) for _, sampling in asked]
    generations = llm.generate([prompt for prompt, _ in asked], params, progress=False)
    return [
        Job(
            _body(prompt, sampling),
            generation.outputs[0].token_ids,
            generation.outputs[0].text,
        )
        for (prompt, sampling), generation in zip(asked, generations, strict=True)
    ]
