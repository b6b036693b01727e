"""Names of clients' jobs, which any router can compute, and who may ask for them. Knows no workers."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers

from router.config import ApiConfig
from workers.errors import InvalidRequest

_PUBLIC_ID = re.compile(r"(?:chatcmpl-|cmpl-|resp_|msg_)?([0-9a-f]{32})")
_KEY = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True, slots=True)
class Naming:
    """What makes an answer the same, byte for byte, whoever writes it: beside the request itself."""

    job_id: str
    created: int

    @classmethod
    def new(cls, job_id: str = "") -> Naming:
        return cls(job_id or uuid.uuid4().hex, int(time.time()))

    @property
    def seed(self) -> int:
        """For a request without one of its own: who computes it again draws the same tokens."""
        return int.from_bytes(hashlib.sha256(f"seed {self.job_id}".encode()).digest()[:8]) >> 1


def job_of_key(owner: str, key: str) -> str:
    """The job that an owner calls so."""
    return hashlib.sha256(f"job {owner} {key}".encode()).hexdigest()[:32]


def key_in(headers: Headers, config: ApiConfig) -> str:
    """The client's name for what it sends, under which it is not computed twice; empty: none. Raises InvalidRequest."""
    key = headers.get("idempotency-key") or (headers.get("x-request-id", "") if config.join_request_ids else "")
    if key and not _KEY.fullmatch(key):
        raise InvalidRequest("an Idempotency-Key has 1 to 256 visible ASCII characters", "Idempotency-Key")
    return key


def jobs_called(name: str, owner: str) -> list[str]:
    """The jobs that a client may mean: by an answer's id, or by the key that it was sent with."""
    public = _PUBLIC_ID.fullmatch(name)
    return [*([public[1]] if public else []), job_of_key(owner, name)]
