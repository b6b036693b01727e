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


def golden_jobs(asked: Sequence[tuple[list[int], dict[str, Any]]], **settings: Any) -> list[Job]:
    """Runs prompts, each with its own sampling fields (max_tokens, seed, ...), to their bounds. `settings` are those of LLM."""
    from cluster.llm import LLM, SamplingParams

    llm = LLM(str(MODEL), **settings)
    params = [SamplingParams(ignore_eos=True, **sampling) for _, sampling in asked]
    generations = llm.generate([prompt for prompt, _ in asked], params, progress=False)
    return [
        Job(
            {"model": MODEL.name, "prompt": prompt, **sampling, "extra_body": dict(EXTRA)},
            generation.outputs[0].token_ids,
            generation.outputs[0].text,
        )
        for (prompt, sampling), generation in zip(asked, generations, strict=True)
    ]
