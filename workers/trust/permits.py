"""Who may take a running request over: the one worker that a router has made a permit for. Values only.

A router gives each attempt a key when it sends it to a worker. To move it, it makes a permit of that key and the id of the worker
that is to have it; the one that runs it makes the same. Who has seen the request's name, its prompt worker for one, has no permit, and a permit is of no use
to a worker with another id, as ids stand in certificates.
"""

from __future__ import annotations

import hashlib
import hmac

_BYTES = 16


def make_key(secret: bytes, attempt: str) -> bytes:
    """The key of an attempt, by its name on the wire. `secret` is its router's own: 32 random bytes."""
    return hashlib.blake2b(attempt.encode(), key=secret, digest_size=_BYTES).digest()


def make_permit(key: bytes, worker_id: str) -> bytes:
    """For the worker of this id to take over the attempt that has this key."""
    return hashlib.blake2b(worker_id.encode(), key=key, digest_size=_BYTES).digest()


def is_permit(permit: bytes, key: bytes, worker_id: str) -> bool:
    return hmac.compare_digest(permit, make_permit(key, worker_id))
