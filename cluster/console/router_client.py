"""Asks a running router over HTTP, and turns what can go wrong into errors that say what to do."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from workers.errors import BatonError, InvalidConfig


def authorities(url: str) -> ssl.SSLContext | bool:
    """Whose certificates are believed at a URL: the system's authorities, or those in SSL_CERT_FILE."""
    return ssl.create_default_context() if url.startswith("https:") else False


class RouterUnreachable(BatonError):
    """No router answers at the URL, or not as one."""


class RouterClient:
    """The admin part of a router's HTTP API, and a streamed chat. Use as a context manager."""

    def __init__(self, url: str, api_key: str = "", timeout_s: float = 60.0) -> None:
        self._url = url
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # trust_env: a proxy for the internet must not be asked for this host.
        self._client = httpx.Client(
            base_url=url, headers=headers, timeout=timeout_s, trust_env=False, verify=authorities(url)
        )

    def __enter__(self) -> RouterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def status(self) -> dict[str, Any]:
        """GET /admin/status: a RouterStatus as JSON."""
        return self._ask("GET", "/admin/status")

    def roles(self) -> dict[str, Any]:
        """GET /admin/roles: what decides on roles, and what it has decided, as JSON."""
        return self._ask("GET", "/admin/roles")

    def set_role(self, worker_id: str, role: str, force: bool, pin: bool | None = None) -> dict[str, Any]:
        """Switches a role; returns the WorkerStatus as JSON. Raises InvalidConfig when the router refuses."""
        body = {"role": role, "force": force, "pin": pin}
        return self._ask("POST", f"/admin/workers/{quote(worker_id, safe='')}/role", body)

    def set_pinned(self, worker_id: str, is_pinned: bool) -> dict[str, Any]:
        """Keeps a worker out of the role controller's hands, or gives it back. Raises InvalidConfig when the router refuses."""
        return self._ask("POST", f"/admin/workers/{quote(worker_id, safe='')}/pin", {"pin": is_pinned})

    def set_draining(self, worker_id: str, is_draining: bool, force: bool) -> dict[str, Any]:
        """Has a worker take no new work, or take it again; returns the WorkerStatus as JSON. Raises InvalidConfig."""
        body = {"drain": is_draining, "force": force}
        return self._ask("POST", f"/admin/workers/{quote(worker_id, safe='')}/drain", body)

    def keys(self) -> dict[str, Any]:
        """GET /admin/keys: those of all tenants, as JSON, without the keys themselves."""
        return self._ask("GET", "/admin/keys")

    def create_key(self, body: dict[str, Any]) -> dict[str, Any]:
        """Has the hash of a new key kept. Raises InvalidConfig when the router refuses."""
        return self._ask("POST", "/admin/keys", body)

    def end_key(self, key_id: str, expires_s: float | None) -> dict[str, Any]:
        """A key counts no more, from now or from then on. Raises InvalidConfig when the router refuses."""
        return self._ask("POST", f"/admin/keys/{quote(key_id, safe='')}/end", {"expires_s": expires_s})

    def stream_chat(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Iterator[str]:
        """The answer's text as it comes. `options` are further fields of the request body."""
        body = {"messages": messages, "stream": True, **options}
        with self._errors(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if not response.is_success:
                response.read()
                self._checked(response)
            for line in response.iter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data:"))
                if "error" in chunk:
                    raise RouterUnreachable(f"the answer broke off: {chunk['error'].get('message')}")
                for choice in chunk.get("choices", ()):
                    if text := choice.get("delta", {}).get("content"):
                        yield text

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._errors():
            return self._checked(self._client.request(method, path, json=body))

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code == 401:
            what = "give it with --api-key-file or BATON_API_KEY; for /admin with --admin-key-file or BATON_ADMIN_KEY"
            raise InvalidConfig(f"the router asks for a key; {what}")
        try:
            answer = response.json()
        except ValueError as error:
            raise RouterUnreachable(f"what answers at {self._url} is no Baton router; is --url right?") from error
        if response.is_success and isinstance(answer, dict):
            return answer
        message = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
        if message is None:
            raise RouterUnreachable(f"what answers at {self._url} is no Baton router; is --url right?")
        raise InvalidConfig(f"the router refused: {message}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise RouterUnreachable(f"the router at {self._url} did not answer in time") from error
        except httpx.RemoteProtocolError as error:
            raise RouterUnreachable(f"the connection to {self._url} broke off: {error}") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise RouterUnreachable(
                f"no router answers at {self._url} ({error}); is `baton serve` running, and is --url right?"
            ) from error
