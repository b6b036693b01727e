"""Writes a line for each request that was answered: who, what, how long and how many tokens, and no text of it.

Lines of the kind json are also a trace as Mooncake's: `timestamp` (ms), `input_length`, `output_length`, and `hash_ids`, one for each
512 tokens of the prompt. Equal ids are equal beginnings of prompts; they are salted anew by each router's process, so that nobody
learns from them whether a prompt was one that he guesses.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import xxhash
from starlette.types import Scope

from router.api.job_progress import Choice, JobProgress
from router.api.sse import to_json
from router.config import ApiConfig
from router.line_file import LineFile
from workers.errors import InvalidConfig
from workers.kv_cache.block_hash import PromptTokens, token_bytes

HASHED_TOKENS = 512
"""As in Mooncake's traces."""
_ID_BITS = 28


class AccessLog:
    """Of one router's API."""

    def __init__(self, config: ApiConfig) -> None:
        """Raises InvalidConfig when the file cannot be written."""
        self._is_json = config.access_log == "json"
        self.is_on = config.access_log != "off"
        self._lines: LineFile | None = None
        if self.is_on:
            try:
                self._lines = LineFile(config.access_log_file, "the access log")
            except OSError as error:
                raise InvalidConfig(
                    f"router.api.access_log_file {config.access_log_file!r} cannot be written: {error.strerror}"
                ) from error
        self._salt = secrets.token_bytes(8)

    def note(self, scope: Scope, status: int, begin_s: float) -> None:
        """A request that began at `begin_s` (of the monotonic clock) has been answered. Only while it is on."""
        assert self._lines is not None
        now, took_s = time.time(), time.monotonic() - begin_s
        state, client = scope["state"], scope.get("client")
        entry = {
            "timestamp": round((now - took_s) * 1000, 3),
            "time": datetime.fromtimestamp(now - took_s, UTC).isoformat(timespec="milliseconds"),
            "request_id": state["request_id"],
            "client": client[0] if client else "",
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "refusal": state.get("refusal", ""),
            "duration_s": round(took_s, 6),
        }
        work: JobProgress | None = state.get("work")
        if self._is_json:
            for more in self._choices(work, begin_s) if work else ({},):
                self._lines.write(to_json({**entry, **more}))
        else:
            tokens = f" {work.prompt_tokens}+{work.completion_tokens} tokens" if work else ""
            path = to_json(f"{entry['method']} {entry['path']}")
            self._lines.write(
                f"{entry['time']} {entry['client'] or '-'} {path} {status} {took_s:.3f}s{tokens} {entry['request_id']}"
            )

    def close(self) -> None:
        """What waits is written."""
        if self._lines is not None:
            self._lines.close()

    def _choices(self, work: JobProgress, begin_s: float) -> Iterator[dict[str, Any]]:
        hashed: dict[int, list[int]] = {}
        for choice in work.choices:
            place = choice.index // work.job.n
            if place not in hashed:
                hashed[place] = self._hash_ids(choice)
            yield {
                "choice": choice.index,
                "input_length": len(choice.request.prompt_token_ids),
                "output_length": choice.num_tokens,
                "cached_tokens": choice.cached_tokens,
                "ttft_s": None if choice.first_s is None else round(choice.first_s - begin_s, 6),
                "hash_ids": hashed[place],
            }

    def _hash_ids(self, choice: Choice) -> list[int]:
        prompt = choice.request.prompt_token_ids
        if not isinstance(prompt, PromptTokens):
            prompt = PromptTokens(prompt)
        hashes = prompt.chain(HASHED_TOKENS).hashes
        named = [hash_.to_bytes(8, "little") for hash_ in hashes]
        if rest := prompt[len(hashes) * HASHED_TOKENS :]:
            named.append((named[-1] if named else b"") + token_bytes(rest))
        return [xxhash.xxh3_64_intdigest(self._salt + name) >> (64 - _ID_BITS) for name in named]
