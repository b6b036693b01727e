"""/openapi.json, the document of every endpoint, and /docs, the same as a page without scripts; both are made once, from tables."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from router.api.endpoints import ENDPOINTS, JSON, Endpoint
from router.api.health import product_version
from router.config import ApiConfig

_REF = "#/components/schemas/{model}"
_PHRASES = {
    400: "The body is wrong; `error.param` names the field",
    401: "The key is missing or wrong",
    403: "Not served to this client",
    404: "There is no such model, response, request or worker",
    409: "The request was cancelled or is answered elsewhere, or there is such a key already",
    413: "The body is too large",
    415: "The body is not sent as application/json",
    422: "Another body was sent with this Idempotency-Key",
    429: "Too much at once; retry-after says when to come back",
    500: "An internal error, or workers died one after the other under the request",
    503: "No worker can run it now; x-should-retry says whether to send it again",
    504: "It took longer than it may",
}
_KEYS = {
    "api": "An API key, where API keys are set",
    "admin": "An admin key, where keys are set",
    "metrics": "An API key or an admin key, where the settings ask for one",
    "none": "No key",
}


def document_routes(config: ApiConfig) -> APIRouter:
    routes = APIRouter()
    document = make_document(config)
    written, page = json.dumps(document, ensure_ascii=False), make_page(document)

    @routes.get("/openapi.json", response_model=None)
    async def openapi() -> Response:
        return Response(written, media_type=JSON)

    @routes.get("/docs", response_model=None)
    async def docs() -> Response:
        headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
        return Response(page, headers=headers, media_type="text/html")

    return routes


class _Untitled(GenerateJsonSchema):
    """Without titles that repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def make_document(config: ApiConfig) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an API with these settings, of which only the keys and the prefix matter; what other settings bound is refused with 400."""
    kinds: dict[type[BaseModel], JsonSchemaMode] = {}
    for endpoint in ENDPOINTS:
        for kind in (endpoint.body, endpoint.answer, endpoint.chunk, endpoint.error):
            if kind is not None:
                kinds[kind] = "validation"
    _, schemas = models_json_schema(list(kinds.items()), ref_template=_REF, schema_generator=_Untitled)
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint, config)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": product_version()},
        **({"servers": [{"url": config.root_path}]} if config.root_path else {}),
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "api": {"type": "http", "scheme": "bearer", "description": "One of router.api.api_keys"},
                "admin": {"type": "http", "scheme": "bearer", "description": "One of router.api.admin_keys"},
            },
        },
    }


def _operation(endpoint: Endpoint, config: ApiConfig) -> dict[str, Any]:
    names = [part[1:-1] for part in endpoint.path.split("/") if part.startswith("{")]
    found: dict[str, Any] = {endpoint.kind: {"schema": _schema_of(endpoint)}}
    if endpoint.chunk is not None:
        what = f"Lines `data: ` with a {endpoint.chunk.__name__} each, or an error in place of one; OpenAI's older kinds end with `[DONE]`"
        found["text/event-stream"] = {"schema": {"type": ["string", "object"], "description": what}}
    responses = {"200": {"description": "The answer", "content": found}}
    for status in sorted({*endpoint.errors, *(() if endpoint.key == "none" else (401, 403))}):
        error = {JSON: {"schema": {"$ref": _REF.format(model=endpoint.error.__name__)}}}
        responses[str(status)] = {"description": _PHRASES[status], "content": error}
    operation: dict[str, Any] = {
        "operationId": "_".join(
            (endpoint.method, *endpoint.path.strip("/").replace("{", "").replace("}", "").split("/"))
        ),
        "summary": endpoint.summary,
        "description": _KEYS[endpoint.key],
        "security": _security(endpoint, config),
        "responses": responses,
    }
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in endpoint.query
    ]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        schema = {"$ref": _REF.format(model=endpoint.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return operation


def _security(endpoint: Endpoint, config: ApiConfig) -> list[dict[str, list[str]]]:
    """The keys that open an endpoint; none where it is open, or goes by who asks."""
    kinds = {"api": bool(config.api_keys), "admin": bool(config.admin_keys or config.api_keys)}
    match endpoint.key:
        case "api" | "admin":
            return [{endpoint.key: []}] if kinds[endpoint.key] else []
        case "none":
            return []
        case _:
            is_open = (config.metrics if endpoint.path == "/metrics" else config.docs) == "open"
            return [] if is_open or not kinds["admin"] else [{name: []} for name in ("api", "admin")]


def _schema_of(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.answer is None:
        return {"type": "object" if endpoint.kind == JSON else "string"}
    return {"$ref": _REF.format(model=endpoint.answer.__name__)}


_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "h2{font-family:monospace;margin-top:2em;border-top:1px solid #ccc;padding-top:1em}"
    "pre{background:#f4f4f4;padding:1em;overflow:auto}td{padding:0 1em 0 0;vertical-align:top}"
)


def make_page(document: dict[str, Any]) -> str:
    """The document for people: nothing in it is loaded from elsewhere, and nothing runs."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Baton</title>",
        f"<style>{_STYLE}</style><h1>Baton {html.escape(document['info']['version'])}</h1>",
        "<p>For programs: <a href=openapi.json>/openapi.json</a></p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(
                f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['summary'])}. {html.escape(operation['description'])}.</p>"
            )
            body = operation.get("requestBody")
            if body:
                parts.append(f"<p>Takes {_link(body['content'][JSON]['schema'])}</p>")
            rows = [
                f"<tr><td>{status}<td>{html.escape(response['description'])}<td>"
                + ", ".join(f"{kind} {_link(content['schema'])}" for kind, content in response["content"].items())
                for status, response in operation["responses"].items()
            ]
            parts.append(f"<table>{''.join(rows)}</table>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f"<h2 id={name}>{name}</h2><pre>{html.escape(json.dumps(schema, indent=1))}</pre>")
    return "".join(parts)


def _link(schema: dict[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    return f"<a href='#{name}'>{name}</a>" if name else ""
