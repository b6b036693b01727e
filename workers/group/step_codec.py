"""Writes a rank's part of a batch, and its results, as plain bytes: a JSON header and an array of integers. Knows no socket.

What parameters and histories do to the logits travels as workers.sampling.edits found it, not as the histories, so a step of
decode is some hundred bytes a sequence; with a penalty, sixteen bytes more for each token that it reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from workers.group.messages import BadMessage
from workers.prompt_scores import PromptScores
from workers.request import SamplingParams, TokenLogprob
from workers.runner import BLOCK_SIZE, Batch, Sampled, SampleSpec, SequenceSlice
from workers.sampling.edits import Ids, LogitEdits, edits_of

_UNREAD = {"logit_bias", "bad_words", "stop", "stop_token_ids"}
"""Parameters that a rank finds in the edits, or has no use for; a client's lists need not travel with each step."""
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SamplingParams) if f.name not in _UNREAD}


def split_by_pool(batch: Batch, num_pools: int, num_blocks: int) -> list[Batch]:
    """The part of each pool, with block ids of its own. Raises IndexError where a block table is too short or mixed."""
    prefill: list[list[SequenceSlice]] = [[] for _ in range(num_pools)]
    decode: list[list[SequenceSlice]] = [[] for _ in range(num_pools)]
    for into, slices in ((prefill, batch.prefill), (decode, batch.decode)):
        for piece in slices:
            needed = -(-(piece.start + len(piece.token_ids)) // BLOCK_SIZE)
            table = piece.block_table[:needed]
            pool = table[0] // num_blocks if table else 0
            local = [block - pool * num_blocks for block in table]
            if len(local) < needed or not 0 <= pool < num_pools or not all(0 <= at < num_blocks for at in local):
                raise IndexError(f"the block table of sequence {piece.sequence_id} is too short or spans two pools")
            into[pool].append(dataclasses.replace(piece, block_table=local))
    return [Batch(tuple(first), tuple(second)) for first, second in zip(prefill, decode, strict=True)]


def encode_batch(batch: Batch) -> bytes:
    """A batch whose block ids are the receiver's own."""
    numbers: list[int] = []
    prefill = [_slice(piece, numbers) for piece in batch.prefill]
    return _join([prefill, [_slice(piece, numbers) for piece in batch.decode]], numbers)


def decode_batch(data: bytes) -> Batch:
    """Raises BadMessage when the bytes are none."""
    try:
        (prefill, decode), numbers = _cut(data)
        reader = _Numbers(numbers)
        batch = Batch(
            tuple(_read_slice(entry, reader) for entry in prefill),
            tuple(_read_slice(entry, reader) for entry in decode),
        )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise BadMessage(f"not a batch: {error}") from error
    return batch


def encode_results(results: Iterable[Sampled]) -> bytes:
    """What a step drew; floats keep their bits."""
    entries = [
        [
            found.sequence_id,
            found.token_id,
            _logprob(found.logprob) if found.logprob is not None else None,
            None if found.prompt_logprobs is None else _scores(found.prompt_logprobs),
        ]
        for found in results
    ]
    return _join(entries, [])


def decode_results(data: bytes) -> list[Sampled]:
    """Raises BadMessage when the bytes are none."""
    try:
        entries, _ = _cut(data)
        return [
            Sampled(
                sequence_id,
                token_id,
                None if logprob is None else _read_logprob(logprob),
                None if prompt is None else _read_scores(prompt),
            )
            for sequence_id, token_id, logprob, prompt in entries
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise BadMessage(f"not results: {error}") from error


def _slice(piece: SequenceSlice, numbers: list[int]) -> list[Any]:
    num_blocks = -(-(piece.start + len(piece.token_ids)) // BLOCK_SIZE)
    numbers += piece.token_ids
    numbers += piece.block_table[:num_blocks]
    return [
        piece.sequence_id,
        len(piece.token_ids),
        piece.start,
        num_blocks,
        None if piece.sample is None else _spec(piece.sample, numbers),
        piece.prompt_logprobs,
        piece.next_token_id,
    ]


def _read_slice(entry: Sequence[Any], numbers: _Numbers) -> SequenceSlice:
    sequence_id, num_tokens, start, num_blocks, sample, prompt_logprobs, next_token_id = entry
    tokens, table = numbers.take(num_tokens), numbers.take(num_blocks)
    spec = None if sample is None else _read_spec(sample, numbers)
    return SequenceSlice(sequence_id, tokens, start, table, spec, prompt_logprobs, next_token_id)


def _spec(spec: SampleSpec, numbers: list[int]) -> list[Any]:
    params = {name: value for name in _DEFAULTS if (value := getattr(spec.params, name)) != _DEFAULTS[name]}
    edits = edits_of(spec) if spec.forced_token_id is None else None
    if edits is not None:
        numbers += edits.bias_ids.tolist()
        numbers += edits.biases.view(np.int32).tolist()
        numbers += edits.banned_ids.tolist()
        numbers += edits.seen_ids.tolist()
        numbers += edits.seen_counts.tolist()
    sizes = None if edits is None else [len(edits.bias_ids), len(edits.banned_ids), len(edits.seen_ids)]
    return [params, spec.choice_index, spec.position, sizes, spec.forced_token_id]


def _read_spec(entry: Sequence[Any], numbers: _Numbers) -> SampleSpec:
    params, choice_index, position, sizes, forced = entry
    if set(params) - set(_DEFAULTS):
        raise BadMessage("a batch names sampling parameters that do not exist")
    edits = None
    if sizes is not None:
        num_biases, num_banned, num_seen = sizes
        bias_ids, biases = numbers.take_array(num_biases), numbers.take_array(num_biases).view(np.float32)
        banned_ids = numbers.take_array(num_banned)
        edits = LogitEdits(bias_ids, biases, banned_ids, numbers.take_array(num_seen), numbers.take_array(num_seen))
    return SampleSpec(SamplingParams(**params), choice_index, position, (), (), forced_token_id=forced, edits=edits)


def _logprob(found: TokenLogprob) -> list[Any]:
    return [found.token_id, found.logprob, list(found.top), found.rank]


def _read_logprob(entry: Sequence[Any]) -> TokenLogprob:
    token_id, logprob, top, rank = entry
    return TokenLogprob(token_id, logprob, tuple((token, value) for token, value in top), rank)


def _scores(scores: PromptScores) -> list[Any]:
    arrays = (scores.token_ids, scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
    return [scores.first, *(array.tolist() for array in arrays)]


def _read_scores(entry: Sequence[Any]) -> PromptScores:
    first, token_ids, logprobs, ranks, top_ids, top_logprobs = entry
    ids = np.array(token_ids, np.int32)
    tops = np.array(top_ids, np.int32).reshape(len(ids), -1), np.array(top_logprobs, np.float32).reshape(len(ids), -1)
    return PromptScores(first, ids, np.array(logprobs, np.float32), np.array(ranks, np.int32), *tops)


class _Numbers:
    def __init__(self, values: Sequence[int]) -> None:
        self._values, self._at = values, 0

    def take(self, count: int) -> list[int]:
        found = list(self._values[self._at : self._at + count])
        if len(found) != count:
            raise IndexError("a batch ends early")
        self._at += count
        return found

    def take_array(self, count: int) -> Ids:
        return np.array(self.take(count), dtype=np.int32)


def _join(document: object, numbers: list[int]) -> bytes:
    header = json.dumps(document, separators=(",", ":")).encode()
    return len(header).to_bytes(4, "little") + header + np.array(numbers, dtype="<i8").tobytes()


def _cut(data: bytes) -> tuple[Any, list[int]]:
    end = 4 + int.from_bytes(data[:4], "little")
    numbers: list[int] = np.frombuffer(data[end:], dtype="<i8").tolist()
    return json.loads(data[4:end]), numbers
