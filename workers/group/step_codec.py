"""Writes a rank's part of each batch, and its results, as protobuf. Knows no socket.

What a rank knows from the step before is not sent again: most of a block table, and a sequence's parameters. What parameters and
histories do to the logits travels as workers.sampling.edits found it, not as the histories; with a penalty, eight bytes for each
token that it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from workers.group.messages import BadMessage
from workers.pb import group_pb2 as pb
from workers.request import SamplingParams
from workers.runner import BLOCK_SIZE, Batch, LogitEdits, Sampled, SampleSpec, SequenceSlice
from workers.sampling.edits import edits_of
from workers.wire.request_protobuf import (
    params_from_pb,
    params_to_pb,
    scores_from_pb,
    scores_to_pb,
    token_logprob_from_pb,
    token_logprob_to_pb,
)

Row = npt.NDArray[np.int32]

_NO_BLOCKS: Row = np.empty(0, np.int32)


def split_by_pool(batch: Batch, num_pools: int, num_blocks: int) -> list[Batch]:
    """The part of each pool, with block ids of its own. Raises IndexError where a block table is too short or mixed."""
    prefill: list[list[SequenceSlice]] = [[] for _ in range(num_pools)]
    decode: list[list[SequenceSlice]] = [[] for _ in range(num_pools)]
    for into, slices in ((prefill, batch.prefill), (decode, batch.decode)):
        for piece in slices:
            needed = -(-(piece.start + len(piece.token_ids)) // BLOCK_SIZE)
            table = np.asarray(piece.block_table[:needed], np.int32)
            pool = int(table[0]) // num_blocks if len(table) else 0
            local = table - pool * num_blocks
            if len(local) < needed or not 0 <= pool < num_pools or ((local < 0) | (local >= num_blocks)).any():
                raise IndexError(f"the block table of sequence {piece.sequence_id} is too short or spans two pools")
            into[pool].append(dataclasses.replace(piece, block_table=local))
    return [Batch(tuple(first), tuple(second)) for first, second in zip(prefill, decode, strict=True)]


@dataclasses.dataclass(slots=True)
class _Known:
    """What both ends know of a sequence that was in the step before."""

    row: Row
    params: SamplingParams | None


class BatchWriter:
    """Writes the batches of one pool, for ranks that read every one of them. In each epoch it begins anew."""

    def __init__(self) -> None:
        self._epoch = 0
        self._known: dict[int, _Known] = {}

    def write(self, epoch: int, batch: Batch) -> bytes:
        """A batch whose block ids are the readers' own."""
        before, self._known = (self._known if epoch == self._epoch else {}), {}
        self._epoch = epoch
        message = pb.Batch(
            prefill=[self._slice(piece, before) for piece in batch.prefill],
            decode=[self._slice(piece, before) for piece in batch.decode],
        )
        data: bytes = message.SerializeToString()
        return data

    def _slice(self, piece: SequenceSlice, before: dict[int, _Known]) -> pb.Slice:
        num_blocks = -(-(piece.start + len(piece.token_ids)) // BLOCK_SIZE)
        row = np.array(piece.block_table[:num_blocks], np.int32)
        known = before.get(piece.sequence_id, _Known(_NO_BLOCKS, None))
        count = min(len(known.row), num_blocks)
        num_known = count if np.array_equal(known.row[:count], row[:count]) else 0
        message = pb.Slice(
            sequence_id=piece.sequence_id,
            token_ids=np.array(piece.token_ids, "<i4").tobytes(),
            start=piece.start,
            num_known=num_known,
            blocks=row[num_known:].astype("<i4").tobytes(),
            prompt_logprobs=piece.prompt_logprobs,
            next_token_id=piece.next_token_id,
        )
        params = known.params
        if piece.sample is not None:
            message.sample.CopyFrom(_spec(piece.sample, params))
            params = piece.sample.params
        self._known[piece.sequence_id] = _Known(row, params)
        return message


class BatchReader:
    """The rank's end of a BatchWriter."""

    def __init__(self) -> None:
        self._epoch = 0
        self._known: dict[int, _Known] = {}

    def read(self, epoch: int, data: bytes) -> Batch:
        """Raises BadMessage when the bytes are no batch that follows the one before."""
        before, self._known = (self._known if epoch == self._epoch else {}), {}
        self._epoch = epoch
        try:
            message = pb.Batch.FromString(data)
            prefill = tuple([self._slice(entry, before) for entry in message.prefill])
            decode = tuple([self._slice(entry, before) for entry in message.decode])
        except (DecodeError, ValueError) as error:
            raise BadMessage(f"not a batch: {error}") from error
        return Batch(prefill, decode)

    def _slice(self, message: pb.Slice, before: dict[int, _Known]) -> SequenceSlice:
        known = before.get(message.sequence_id, _Known(_NO_BLOCKS, None))
        if message.num_known > len(known.row):
            raise BadMessage(f"{message.num_known} blocks of sequence {message.sequence_id} are not known here")
        row = known.row[: message.num_known]
        if message.blocks:
            row = np.concatenate([row, _ints(message.blocks)])
        spec, params = None, known.params
        if message.HasField("sample"):
            spec = _read_spec(message.sample, params)
            params = spec.params
        self._known[message.sequence_id] = _Known(row, params)
        token_ids = _ints(message.token_ids).tolist()
        if len(row) * BLOCK_SIZE < message.start + len(token_ids):
            raise BadMessage(f"the block table of sequence {message.sequence_id} is too short")
        return SequenceSlice(
            message.sequence_id,
            token_ids,
            message.start,
            row,
            spec,
            message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
            message.next_token_id if message.HasField("next_token_id") else None,
        )


def encode_results(results: Iterable[Sampled]) -> bytes:
    """What a step drew; logprobs have 32 bits here as they have there."""
    message = pb.Results()
    for found in results:
        entry = message.results.add(sequence_id=found.sequence_id, token_id=found.token_id)
        if found.logprob is not None:
            entry.logprob.CopyFrom(token_logprob_to_pb(found.logprob))
        if found.prompt_logprobs is not None:
            entry.prompt_logprobs.CopyFrom(scores_to_pb(found.prompt_logprobs))
    data: bytes = message.SerializeToString()
    return data


def decode_results(data: bytes) -> list[Sampled]:
    """Raises BadMessage when the bytes are none."""
    try:
        message = pb.Results.FromString(data)
        return [
            Sampled(
                entry.sequence_id,
                entry.token_id if entry.HasField("token_id") else None,
                token_logprob_from_pb(entry.logprob) if entry.HasField("logprob") else None,
                scores_from_pb(entry.prompt_logprobs) if entry.HasField("prompt_logprobs") else None,
            )
            for entry in message.results
        ]
    except (DecodeError, ValueError) as error:
        raise BadMessage(f"not results: {error}") from error


def _spec(spec: SampleSpec, known: SamplingParams | None) -> pb.Spec:
    message = pb.Spec(choice_index=spec.choice_index, position=spec.position, forced_token_id=spec.forced_token_id)
    if spec.params is not known and spec.params != known:
        # A client's lists are in the edits, or of no use to a rank.
        message.params.CopyFrom(
            params_to_pb(
                dataclasses.replace(
                    spec.params,
                    logit_bias=(),
                    bad_words=(),
                    stop=(),
                    stop_token_ids=(),
                    grammar="",
                    allowed_token_ids=(),
                    thinking=None,
                ).with_seed(0)
            )
        )
    edits = edits_of(spec) if spec.forced_token_id is None else None
    if edits is not None:
        message.edits.CopyFrom(
            pb.Edits(
                bias_ids=edits.bias_ids.astype("<i4").tobytes(),
                biases=edits.biases.astype("<f4").tobytes(),
                banned_ids=edits.banned_ids.astype("<i4").tobytes(),
                seen_ids=edits.seen_ids.astype("<i4").tobytes(),
                seen_counts=edits.seen_counts.astype("<i4").tobytes(),
                allowed=None if edits.allowed is None else edits.allowed.astype("<i4").tobytes(),
            )
        )
    return message


def _read_spec(message: pb.Spec, known: SamplingParams | None) -> SampleSpec:
    params = params_from_pb(message.params) if message.HasField("params") else known
    if params is None:
        raise BadMessage("the parameters of a sequence are not known here")
    edits = None
    if message.HasField("edits"):
        wire = message.edits
        biases = np.frombuffer(wire.biases, "<f4").astype(np.float32)
        edits = LogitEdits(
            _ints(wire.bias_ids),
            biases,
            _ints(wire.banned_ids),
            _ints(wire.seen_ids),
            _ints(wire.seen_counts),
            _ints(wire.allowed) if wire.HasField("allowed") else None,
        )
    forced = message.forced_token_id if message.HasField("forced_token_id") else None
    return SampleSpec(params, message.choice_index, message.position, (), (), forced_token_id=forced, edits=edits)


def _ints(data: bytes) -> Row:
    return np.frombuffer(data, "<i4").astype(np.int32)
