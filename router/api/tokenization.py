"""/tokenize and /detokenize: the served model's tokenizer over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.answer import Services, read_body
from router.api.prompts import check_token_ids, read_chat
from router.api.schema import DetokenizeBody, TokenizeBody, parse_body
from router.api.sse import to_json
from router.api.translate import require_model
from workers.errors import InvalidRequest


def tokenization_routes(services: Services) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize", response_model=None)
    async def tokenize(http: HttpRequest) -> Response:
        raw = await read_body(http, services.config)
        answer = await asyncio.to_thread(_tokenize, services, raw)
        return Response(to_json(answer), media_type="application/json")

    @routes.post("/detokenize", response_model=None)
    async def detokenize(http: HttpRequest) -> Response:
        body = parse_body(DetokenizeBody, await read_body(http, services.config))
        model = require_model(body.model, services.backend.model)
        tokens = check_token_ids(body.tokens, model.vocab_size, "tokens")
        text = services.tokenizer.decode(tokens, bool(body.skip_special_tokens))
        return Response(to_json({"prompt": text}), media_type="application/json")

    return routes


def _tokenize(services: Services, raw: bytes) -> dict[str, Any]:
    body = parse_body(TokenizeBody, raw)
    model = require_model(body.model, services.backend.model)
    tokenizer = services.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", "prompt")
    if body.messages is not None:
        generate = body.add_generation_prompt is not False
        special, kwargs = bool(body.add_special_tokens), body.chat_template_kwargs or {}
        tokens = list(read_chat(body.messages, tokenizer, generate, special, kwargs).token_ids)
    else:
        tokens = tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
    strings = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens, "token_strs": strings}
