"""/tokenize, /detokenize and /tokenizer_info: the served model's tokenizer over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.offload import offload
from router.api.prompts import check_token_ids, encode_chat, render_chat
from router.api.schema import DetokenizeBody, TokenizeBody, parse_body
from router.api.services import Services
from router.api.speech import require_model
from router.api.sse import json_parts
from router.api.tools import read_tools
from workers.errors import InvalidRequest
from workers.status import ModelInfo

MAX_TOKENIZE_CHARACTERS = 1 << 20


def tokenization_routes(services: Services) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize", response_model=None)
    async def tokenize(http: HttpRequest) -> Response:
        return await _answer(http, services, _tokenize)

    @routes.post("/detokenize", response_model=None)
    async def detokenize(http: HttpRequest) -> Response:
        return await _answer(http, services, _detokenize)

    @routes.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> Response:
        model, tokenizer = require_model(None, services.backend.model), services.tokenizer
        info = {
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": model.max_model_len,
            "chat_template": tokenizer.chat_template(False) or None,
            "special_tokens": tokenizer.special_tokens,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
            "added_tokens": tokenizer.added_tokens,
        }
        return Response("".join(json_parts(info)), media_type="application/json")

    return routes


async def _answer(
    http: HttpRequest, services: Services, work: Callable[[Services, ModelInfo | None, bytes], dict[str, Any]]
) -> Response:
    async with services.bodies.receive(http) as raw:
        model = services.backend.model

        def written() -> bytes:
            return "".join(json_parts(work(services, model, raw))).encode()

        body = await offload(written, len(raw), services.config.offload_bytes)
    return Response(body, media_type="application/json")


def _detokenize(services: Services, info: ModelInfo | None, raw: bytes) -> dict[str, Any]:
    body = parse_body(DetokenizeBody, raw)
    model = require_model(body.model, info)
    if len(body.tokens) > model.max_model_len:
        raise InvalidRequest(f"tokens takes at most {model.max_model_len}, as the model's context does", "tokens")
    tokens = check_token_ids(body.tokens, model.vocab_size, "tokens")
    return {"prompt": services.tokenizer.decode(tokens, bool(body.skip_special_tokens))}


def _tokenize(services: Services, info: ModelInfo | None, raw: bytes) -> dict[str, Any]:
    body = parse_body(TokenizeBody, raw)
    model = require_model(body.model, info)
    tokenizer = services.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", "prompt")
    if body.messages is not None:
        kwargs = body.chat_template_kwargs or {}
        tools = use.tools if (use := read_tools(body.tools, None, None)) else None
        goes_on = bool(body.continue_final_message)
        if goes_on and body.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
            )
        chat = render_chat(body.messages, tokenizer, body.add_generation_prompt is not False, kwargs, tools, goes_on)
        _check_characters(chat.text, "messages")
        tokens = encode_chat(chat, tokenizer, bool(body.add_special_tokens), services.config.allow_control_tokens)
    else:
        prompt = body.prompt or ""
        _check_characters(prompt, "prompt")
        tokens = tokenizer.encode(prompt, body.add_special_tokens is not False)
    strings = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens, "token_strs": strings}


def _check_characters(text: str, param: str) -> None:
    if len(text) > MAX_TOKENIZE_CHARACTERS:
        what = f"{param} has {len(text)} characters, /tokenize takes {MAX_TOKENIZE_CHARACTERS}: send it in pieces"
        raise InvalidRequest(what, param)
