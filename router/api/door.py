"""Decides who may ask for what: keys, and where none are set, clients of this host that are no web pages. Knows no bodies.

| path | with keys | without |
|---|---|---|
| /health, /ready, /version | everybody | everybody |
| /metrics | everybody, or (api.metrics: key) an API or admin key | everybody, but web pages of other hosts |
| /docs, /openapi.json | as /metrics, by api.docs | as /metrics |
| /admin/ui | everybody; no data in it | this host |
| /admin | an admin key | this host; of web pages the one at /admin/ui alone |
| everything else | an API key | this host (api.insecure: every host); no foreign web page but those of api.cors |
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from router.api.problems import Rejected, rejected
from router.config import ApiConfig, is_loopback
from router.tenants.roster import Key
from router.tenants.tenancy import Caller, Tenancy

OPEN_PATHS = frozenset(("/health", "/ready", "/version"))
"""Of orchestrators; they tell nothing."""
METRICS_PATH = "/metrics"
PAGE_PATH = "/admin/ui"
DOCUMENT_PATHS = frozenset(("/docs", "/openapi.json"))
MONITOR_PATHS = OPEN_PATHS | DOCUMENT_PATHS | {METRICS_PATH}
"""Answered by a router that is about to end, too."""


class Door:
    """The rules of one API. API keys are the tenancy's."""

    def __init__(self, config: ApiConfig, tenancy: Tenancy) -> None:
        self._tenancy = tenancy
        self._admin_keys = _digests(config.admin_keys)
        self._needs_key = {METRICS_PATH: config.metrics == "key"} | dict.fromkeys(DOCUMENT_PATHS, config.docs == "key")
        """By path, of those that may be open."""
        self._is_insecure = config.insecure
        self._allowed_hosts = frozenset(host.lower() for host in config.allowed_hosts)
        self._allowed_origins = frozenset(config.cors.origins)

    def check(self, scope: Scope, headers: Headers) -> Caller:
        """Whose request it is. Raises Rejected: 401 for a missing or wrong key, 403 for a client that has none to send, 415 for a body that is not JSON."""
        path, caller = scope["path"], Caller()
        if path in OPEN_PATHS:
            return caller
        if path == PAGE_PATH:  # it tells nothing by itself
            if not self._admin_keys:
                self._check_admin(scope, headers)
            return caller
        needs_key = self._tenancy.needs_key
        if path in self._needs_key:
            if self._needs_key[path] and (needs_key or self._admin_keys):
                if not _is_one_of(_digest(headers), self._admin_keys):
                    self._check_caller(headers)
            elif not needs_key and not self._is_insecure:
                self._check_host(headers)
        elif path == "/admin" or path.startswith("/admin/"):
            self._check_admin(scope, headers)
        elif needs_key:
            caller = self._check_caller(headers)
        else:
            self._check_keyless(scope, headers)
            caller = Caller(owner=_digest(headers))
        if scope["method"] == "POST" and (headers.get("content-length", "0") != "0" or "transfer-encoding" in headers):
            _check_content_type(headers)  # without a body it is no JSON either, and refused by who reads it
        return caller

    def _check_caller(self, headers: Headers) -> Caller:
        found = self._tenancy.caller(_digest(headers))
        match found:
            case None:
                raise _no_key()
            case Key():
                raise _ended(found)
            case Caller():
                return found

    def _check_admin(self, scope: Scope, headers: Headers) -> None:
        if not _is_own_page(headers):
            raise rejected(403, "web_page_refused", "/admin is not for web pages of other places than this one")
        if self._admin_keys:
            if not _is_one_of(_digest(headers), self._admin_keys):
                raise _no_key()
        elif self._tenancy.needs_key:
            raise rejected(403, "no_admin_keys", "set router.api.admin_keys, or BATON_ADMIN_KEY, to use /admin")
        else:
            _check_client(scope)
            self._check_host(headers)

    def _check_keyless(self, scope: Scope, headers: Headers) -> None:
        host = _name(headers.get("host", ""))
        if not self._is_insecure:
            _check_client(scope)
            self._check_host(headers)
        origin = headers.get("origin")
        if origin is not None and origin in self._allowed_origins:
            return
        if origin is not None:
            page = _page_of(origin)
            if not (page == host or (self._is_here(page) and not self._is_insecure)):
                raise rejected(403, "foreign_origin", "web pages of other hosts are not served without API keys")
        elif headers.get("sec-fetch-site") == "cross-site":
            raise rejected(403, "foreign_origin", "web pages of other hosts are not served without API keys")

    def _check_host(self, headers: Headers) -> None:
        """A page of another host may have had its name point here (DNS rebinding): then it is its name that stands here."""
        if not self._is_here(_name(headers.get("host", ""))):
            raise rejected(
                403, "foreign_host", "without API keys the Host header must name this host, or one of api.allowed_hosts"
            )

    def _is_here(self, host: str) -> bool:
        return is_loopback(host) or host in self._allowed_hosts


def _page_of(origin: str) -> str:
    """The host of a page; empty: that is no address."""
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_own_page(headers: Headers) -> bool:
    """No page at all, or one that came from this very address: the operator's page is the only one here."""
    origin = headers.get("origin")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        return False


@lru_cache(256)
def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _check_client(scope: Scope) -> None:
    """Without keys the server listens on loopback, unless it was told otherwise."""
    client = scope.get("client")
    if client is not None and not is_loopback(client[0]):
        raise rejected(403, "not_from_here", "without keys this is served to clients of this host only")


def _check_content_type(headers: Headers) -> None:
    """A web page can send any other kind to any server without asking it first."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise rejected(415, "unsupported_media_type", "send the body as `Content-Type: application/json`")


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(key.removeprefix("sha256:")) for key in keys)


def _digest(headers: Headers) -> bytes:
    """SHA-256 of the key that was sent; empty: none was."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if not key and "x-api-key" in headers:  # as clients of Anthropic's API send it
        scheme, key = "bearer", headers["x-api-key"]
    return hashlib.sha256(key.strip().encode()).digest() if scheme.lower() == "bearer" else b""


def _is_one_of(given: bytes, digests: tuple[bytes, ...]) -> bool:
    """Compares digests in constant time, every one of them, so that timing tells nothing."""
    found = [hmac.compare_digest(given, digest) for digest in digests]
    return any(found)


def _no_key() -> Rejected:
    return rejected(401, "invalid_api_key", "send a valid key as `Authorization: Bearer KEY`")


def _ended(key: Key) -> Rejected:
    """Told to who has shown the key itself."""
    if key.revoked_s:
        return rejected(
            401, "key_revoked", f"the key {key.key_id} was revoked on {_day(key.revoked_s)}; ask for another one"
        )
    return rejected(401, "key_expired", f"the key {key.key_id} expired on {_day(key.expires_s)}; ask for another one")


def _day(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
