"""Writes and reads what a sender offers to a receiver: a small flat JSON object. Knows no transport."""

from __future__ import annotations

import json
from collections.abc import Mapping

from workers.errors import TransferFailed

MAX_OFFER_BYTES = 16 << 10
"""NIXL's grow with the number of network devices, a few hundred bytes each."""

Value = int | str


def encode(offer: Mapping[str, Value]) -> bytes:
    return json.dumps(offer, separators=(",", ":")).encode()


def decode(offer: bytes, fields: Mapping[str, type[int] | type[str]]) -> dict[str, Value]:
    """The offer's fields, exactly those and of those types. Raises TransferFailed: it came from the network."""
    if len(offer) > MAX_OFFER_BYTES:
        raise TransferFailed(f"an offer of {len(offer)} bytes is too long")
    try:
        value = json.loads(offer)
    except (ValueError, RecursionError) as error:
        raise TransferFailed(f"an offer is not JSON: {error}") from error
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise TransferFailed("an offer has other fields than expected")
    for name, kind in fields.items():
        if type(value[name]) is not kind:
            raise TransferFailed(f"{name} of an offer is no {kind.__name__}")
    return value


def decode_hex(text: Value, num_bytes: int) -> bytes:
    """A token or nonce of exactly `num_bytes`. Raises TransferFailed."""
    try:
        token = bytes.fromhex(str(text))
    except ValueError as error:
        raise TransferFailed("a token of an offer is not hexadecimal") from error
    if len(token) != num_bytes:
        raise TransferFailed(f"a token of an offer has {len(token)} bytes, not {num_bytes}")
    return token
