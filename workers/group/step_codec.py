"""Writes a rank's part of a batch, and its results, as plain bytes: a JSON header and an array of integers. Knows no socket.

Histories travel only where a penalty or a banned word reads them, so a step of decode is some hundred bytes a sequence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from workers.group.messages import BadMessage
from workers.request import SamplingParams, TokenLogprob
from workers.runner import BLOCK_SIZE, Batch, Sampled, SampleSpec, SequenceSlice

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}


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
            [_logprob(entry) for entry in found.prompt_logprobs],
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
                tuple(_read_logprob(entry) for entry in prompt),
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
    has_history = bool(
        spec.params.bad_words
        or spec.params.repetition_penalty != 1
        or spec.params.presence_penalty
        or spec.params.frequency_penalty
    )
    prompt, output = (spec.prompt_token_ids, spec.output_token_ids) if has_history else ((), ())
    numbers += prompt
    numbers += output
    return [
        params, spec.choice_index, spec.position, len(prompt), len(output),
        list(spec.suppressed_token_ids), spec.forced_token_id,
    ]  # fmt: skip


def _read_spec(entry: Sequence[Any], numbers: _Numbers) -> SampleSpec:
    params, choice_index, position, num_prompt, num_output, suppressed, forced = entry
    if set(params) - set(_DEFAULTS):
        raise BadMessage("a batch names sampling parameters that do not exist")
    tuples = {name: _as_tuple(value) for name, value in params.items()}
    return SampleSpec(
        SamplingParams(**tuples),
        choice_index,
        position,
        numbers.take(num_prompt),
        numbers.take(num_output),
        tuple(suppressed),
        forced,
    )


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(entry) for entry in value) if isinstance(value, list) else value


def _logprob(found: TokenLogprob) -> list[Any]:
    return [found.token_id, found.logprob, list(found.top), found.rank]


def _read_logprob(entry: Sequence[Any]) -> TokenLogprob:
    token_id, logprob, top, rank = entry
    return TokenLogprob(token_id, logprob, tuple((token, value) for token, value in top), rank)


class _Numbers:
    def __init__(self, values: Sequence[int]) -> None:
        self._values, self._at = values, 0

    def take(self, count: int) -> list[int]:
        found = list(self._values[self._at : self._at + count])
        if len(found) != count:
            raise IndexError("a batch ends early")
        self._at += count
        return found


def _join(document: object, numbers: list[int]) -> bytes:
    header = json.dumps(document, separators=(",", ":")).encode()
    return len(header).to_bytes(4, "little") + header + np.array(numbers, dtype="<i8").tobytes()


def _cut(data: bytes) -> tuple[Any, list[int]]:
    end = 4 + int.from_bytes(data[:4], "little")
    numbers: list[int] = np.frombuffer(data[end:], dtype="<i8").tolist()
    return json.loads(data[4:end]), numbers
