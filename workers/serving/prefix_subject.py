"""How two workers name prefix-cache blocks to each other: by hashes, and by the tokens that they stand for. Knows no cache."""

from __future__ import annotations

from workers.errors import Refusal, Refused
from workers.handoff.protocol.messages import Prefix
from workers.kv_cache.block_hash import BlockKey, token_bytes
from workers.runner import BLOCK_SIZE


def keys_of(subject: Prefix) -> tuple[BlockKey, ...]:
    """The blocks a receiver asks for. Raises Refused when hashes and tokens do not fit together."""
    hashes, tokens = subject.hashes, subject.token_ids
    if len(tokens) != len(hashes) * BLOCK_SIZE:
        raise Refused(Refusal.INVALID, f"{len(hashes)} blocks come with {len(tokens)} tokens")
    parents = (subject.parent, *hashes[:-1])
    starts = range(0, len(tokens), BLOCK_SIZE)
    return tuple(
        BlockKey(block_hash, parent, token_bytes(tokens[start : start + BLOCK_SIZE]))
        for block_hash, parent, start in zip(hashes, parents, starts, strict=True)
    )


def subject_of(keys: tuple[BlockKey, ...]) -> Prefix:
    """How to ask for a run of blocks."""
    tokens = tuple(token for key in keys for token in key.token_ids)
    return Prefix(tuple(key.block_hash for key in keys), tokens, keys[0].parent)
