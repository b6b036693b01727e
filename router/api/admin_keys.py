"""/admin/keys: the keys of tenants, by name and hash; a key itself is made by who will use it, and never comes here."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.admin_schema import KeyBody, KeyEndBody
from router.api.problems import rejected
from router.api.schema import parse_body
from router.api.services import Services
from router.api.sse import to_json
from router.tenants.roster import Key
from workers.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def key_routes(services: Services) -> APIRouter:
    routes = APIRouter()
    tenancy = services.callers.tenancy

    @routes.get("/admin/keys", response_model=None)
    async def list_keys() -> Response:
        keys = sorted(tenancy.roster.keys.values(), key=lambda key: (key.tenant, key.key_id))
        return _json({"keys": [_written(key) for key in keys]})

    @routes.post("/admin/keys", response_model=None)
    async def create_key(http: HttpRequest) -> Response:
        async with services.bodies.receive(http) as raw:
            body = parse_body(KeyBody, raw)
        for name, value in (("id", body.id), ("tenant", body.tenant)):
            if not _NAME.fullmatch(value):
                raise InvalidRequest(
                    f"{name} takes 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first", name
                )
        if not re.fullmatch("[0-9a-f]{64}", body.sha256):
            raise InvalidRequest("sha256 must be the key's SHA-256 in 64 hex digits", "sha256")
        digest = bytes.fromhex(body.sha256)
        if digest in tenancy.roster.keys or any(key.key_id == body.id for key in tenancy.roster.keys.values()):
            raise rejected(409, "key_exists", "there is a key with this id, or this very key", "id")
        if len(tenancy.roster.keys) >= tenancy.config.max_keys:
            raise rejected(
                409, "too_many_keys", f"router.tenants.max_keys = {tenancy.config.max_keys} are there already"
            )
        key = Key(body.id, body.tenant, digest, _end(body.expires_s), is_stored=True)
        await tenancy.put_key(key)
        return _json(_written(key))

    @routes.post("/admin/keys/{key_id}/end", response_model=None)
    async def end_key(key_id: str, http: HttpRequest) -> Response:
        """Revokes it, at once or (`expires_s`) later."""
        async with services.bodies.receive(http) as raw:
            body = parse_body(KeyEndBody, raw)
        key = next((key for key in tenancy.roster.keys.values() if key.key_id == key_id), None)
        if key is None:
            raise rejected(404, "key_not_found", f"there is no key {key_id!r:.80}", "key_id")
        if not key.is_stored:
            raise rejected(
                409, "key_in_file", "this key stands in a file or in the settings: take it out there", "key_id"
            )
        end_s = _end(body.expires_s)
        if end_s:
            key = replace(key, expires_s=min(end_s, key.expires_s or end_s))
        else:
            key = replace(key, revoked_s=key.revoked_s or time.time())
        await tenancy.put_key(key)
        return _json(_written(key))

    return routes


def _end(expires_s: float | None) -> float:
    if expires_s is None:
        return 0.0
    if not time.time() < expires_s < 1e11:
        raise InvalidRequest("expires_s must be a time that comes, in seconds since 1970", "expires_s")
    return float(expires_s)


def _written(key: Key) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "tenant": key.tenant,
        "sha256": key.digest.hex(),
        "expires_s": key.expires_s or None,
        "revoked_s": key.revoked_s or None,
        "stored": key.is_stored,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")
