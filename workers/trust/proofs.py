"""How two ends of a connection show each other that they know a secret, without saying it. Knows no sockets."""

from __future__ import annotations

import hashlib
import hmac
import secrets

CHALLENGE_BYTES = 16
PROOF_BYTES = 16


def new_challenge() -> bytes:
    """Random bytes that the other end has to answer; never used twice."""
    return secrets.token_bytes(CHALLENGE_BYTES)


def proof(secret: bytes, label: str, *parts: bytes) -> bytes:
    """Shows that its maker knows the secret, for these parts (of fixed sizes) alone."""
    return hmac.digest(secret, label.encode() + b"\0" + b"".join(parts), hashlib.sha256)[:PROOF_BYTES]


def proves(shown: bytes, secret: bytes, label: str, *parts: bytes) -> bool:
    return hmac.compare_digest(shown, proof(secret, label, *parts))
