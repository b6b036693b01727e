"""Steps and results cross between ranks bit for bit, and bytes that are no message are refused."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.group import message_codec
from workers.group.message_codec import MAX_FRAME_BYTES, PREFIX_BYTES, decode, encode, length
from workers.group.messages import (
    BadMessage,
    Beat,
    Blocks,
    Done,
    Form,
    GetBlocks,
    Hello,
    Message,
    PutBlocks,
    Ready,
    Step,
    Welcome,
)  # fmt: skip
from workers.group.step_codec import BatchReader, BatchWriter, decode_results, encode_results, split_by_pool
from workers.pb import group_pb2 as pb
from workers.request import SamplingParams
from workers.runner import Batch, LogitEdits, Sampled, SampleSpec, SequenceSlice
from workers.sampling.constraint import mask_of, tokens_in
from workers.sampling.edits import EditTracker, edits_of
from workers.token_logprobs import PromptScores, TokenLogprob

MESSAGES: tuple[Message, ...] = (
    Hello(1, 4, 99, "host", ""),
    Welcome(17, [[0, 1], [1, 0]], 88, 5, 4096, "00ff"),
    Ready("weights", 12, shares_memory=False, offers_direct=True, kernels="torch"),
    GetBlocks([3, 4], 2, 7),
    PutBlocks([3], 2, 8, b"heads"),
    Blocks(8, b"heads"),
    Form(3, "127.0.0.1", 4444, [[0, 1]], "decode", 65537, direct=True),
    Step(3, 8, "mixed", 0, True, False, 1, [3, 2, 1], 5, 2, b"\x00\xff"),
    Done(3, 8, 0.25, 7, 99, [[1, 2]], b"tail"),
    Beat(),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    frame = encode(message)
    assert len(frame) == PREFIX_BYTES + length(frame[:PREFIX_BYTES])
    assert decode(frame[PREFIX_BYTES:]) == message


@pytest.mark.parametrize(
    "message", [Step(1, 2, "decode", 3, True, True, 4, [5], 6, 7, b"8"), Done(1, 2, 0.5, 3, 4, [[5], [6, 7]], b"8")]
)
def test_what_is_said_in_every_step_travels_whole_and_nobody_asks_what_fields_there_are(
    message: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(getattr(message, field.name) for field in fields(message)), "a field left as it is might be forgotten"
    for table in ("_FIELDS", "_ENTRIES", "_KINDS"):
        monkeypatch.setattr(message_codec, table, {})
    assert decode(encode(message)[PREFIX_BYTES:]) == message


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", b"\x0a\x05ab", b"\xfa\x01\x00"])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data)


def test_a_message_of_a_newer_version_is_read_as_far_as_it_is_known() -> None:
    frame = pb.Frame.FromString(encode(Form(3, "h", 4444, [[0, 1]], "decode", 65537))[PREFIX_BYTES:])
    frame.form.MergeFromString(b"\xf8\x07\x01")
    frame.MergeFromString(b"\xf8\x07\x01")
    assert decode(frame.SerializeToString()) == Form(3, "h", 4444, [[0, 1]], "decode", 65537)


def test_a_frame_above_the_bound_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadMessage, match="above the bound"):
        length((MAX_FRAME_BYTES + 1).to_bytes(PREFIX_BYTES, "little"))


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 99),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.1, 1),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.sampled_from([(), ((3, 1.5), (4, -2.0))]),
    bad_words=st.sampled_from([(), ((1, 2), (3,))]),
    logprobs=st.sampled_from([None, 0, 5]),
)
TOKENS = st.lists(st.integers(0, 103423), min_size=1, max_size=70)


@st.composite
def slices(draw: st.DrawFn, decode: bool) -> SequenceSlice:
    tokens = draw(TOKENS)[:1] if decode else draw(TOKENS)
    start = draw(st.integers(0, 300))
    spec = None
    if decode or draw(st.booleans()):
        spec = SampleSpec(
            draw(PARAMS), draw(st.integers(0, 3)), draw(st.integers(0, 9)), draw(TOKENS), draw(TOKENS),
            tuple(draw(st.lists(st.integers(0, 9), max_size=2))), draw(st.sampled_from([None, 7])),
        )  # fmt: skip
    num_blocks = -(-(start + len(tokens)) // 64)
    table = draw(st.lists(st.integers(0, 99), min_size=num_blocks, max_size=num_blocks + 2))
    return SequenceSlice(draw(st.integers(0, 2**40)), tokens, start, table, spec, draw(st.sampled_from([None, 3])), 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(slices(False), max_size=3), st.lists(slices(True), max_size=3))
def test_a_batch_arrives_with_everything_that_its_computation_reads(
    prefill: list[SequenceSlice], decode: list[SequenceSlice]
) -> None:
    batch = Batch(tuple(prefill), tuple(decode))
    check(batch, BatchReader().read(1, BatchWriter().write(1, batch)))


def check(batch: Batch, found: Batch) -> None:
    prefill, decode = batch.prefill, batch.decode
    for before, after in zip((*prefill, *decode), (*found.prefill, *found.decode), strict=True):
        assert (after.sequence_id, after.start, after.prompt_logprobs) == (
            before.sequence_id, before.start, before.prompt_logprobs,
        )  # fmt: skip
        assert list(after.token_ids) == list(before.token_ids)
        assert list(after.block_table) == list(before.block_table)[: len(after.block_table)]
        assert len(after.block_table) * 64 >= after.start + len(after.token_ids)
        assert (after.sample is None) == (before.sample is None)
        if before.sample is None or after.sample is None:
            continue
        unread = {"logit_bias": (), "bad_words": (), "stop": (), "stop_token_ids": ()}
        assert after.sample.params == replace(before.sample.params, **unread)
        assert after.sample.forced_token_id == before.sample.forced_token_id
        wanted = edits_of(before.sample) if before.sample.forced_token_id is None else None
        assert (after.sample.edits is None) == (wanted is None)
        if wanted is not None and after.sample.edits is not None:
            for field in fields(LogitEdits):
                sent, found_array = getattr(wanted, field.name), getattr(after.sample.edits, field.name)
                assert (found_array is None) == (sent is None)
                if sent is not None:
                    assert found_array.dtype == sent.dtype and found_array.tolist() == sent.tolist()


def test_a_mask_arrives_and_its_grammar_stays_where_it_is() -> None:
    spec = SampleSpec(SamplingParams(seed=1, grammar="start: /a/"), 0, 0, (), ())
    spec.edits = replace(EditTracker(SamplingParams(), ()).edits(()), allowed=mask_of([3, 40], 99))
    data = BatchWriter().write(1, Batch((), (SequenceSlice(5, (5,), 0, [0], spec),)))
    (found,) = BatchReader().read(1, data).decode
    assert found.sample is not None and found.sample.edits is not None and found.sample.edits.allowed is not None
    assert tokens_in(found.sample.edits.allowed).tolist() == [3, 40]
    assert not found.sample.params.grammar


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[int, Batch]]:
    """Steps with their epochs, in which sequences come, go, grow, are preempted and come back."""
    tables: dict[int, list[int]] = {}
    specs = [SampleSpec(draw(PARAMS), 0, 0, (), ()) for _ in range(3)]
    steps = []
    epoch = 1
    for _ in range(draw(st.integers(1, 12))):
        epoch += draw(st.sampled_from([0, 0, 0, 1]))
        pieces = []
        for name in draw(st.sets(st.integers(0, 4), max_size=4)):
            table = tables.setdefault(name, [])
            if draw(st.sampled_from([True, False, False, False])):
                table.clear()  # preempted: it begins anew with other blocks
            table += draw(st.lists(st.integers(0, 99), min_size=0 if table else 1, max_size=2))
            start = len(table) * 64 - draw(st.integers(1, 64))
            pieces.append(SequenceSlice(name, (5,), start, np.array(table, np.int32), draw(st.sampled_from(specs))))
        steps.append((epoch, Batch((), tuple(pieces))))
    return steps


@settings(max_examples=100)
@given(stories())
def test_batches_of_an_epoch_arrive_whole_though_only_what_is_new_travels(steps: list[tuple[int, Batch]]) -> None:
    writer, reader = BatchWriter(), BatchReader()
    for epoch, batch in steps:
        check(batch, reader.read(epoch, writer.write(epoch, batch)))


def test_a_decode_step_of_long_sequences_is_some_hundred_bytes_and_a_new_epoch_says_all_again() -> None:
    spec = SampleSpec(SamplingParams(temperature=0.5, seed=1), 0, 5, (), ())

    def batch(num_blocks: int) -> Batch:
        table = np.arange(num_blocks, dtype=np.int32)
        start = num_blocks * 64 - 1
        return Batch((), tuple(SequenceSlice(name, (5,), start, table, spec) for name in range(16)))

    writer = BatchWriter()
    first = writer.write(1, batch(2000))
    assert len(first) > 16 * 2000 * 4
    assert len(writer.write(1, batch(2000))) < 16 * 40
    assert len(writer.write(1, batch(2001))) < 16 * 50
    assert len(writer.write(2, batch(2001))) > 16 * 2000 * 4


def test_a_batch_that_builds_on_one_that_was_not_read_is_refused() -> None:
    spec = SampleSpec(SamplingParams(), 0, 5, (), ())
    batch = Batch((), (SequenceSlice(1, (5,), 100, [3, 4], spec),))
    writer = BatchWriter()
    writer.write(1, batch)
    with pytest.raises(BadMessage):
        BatchReader().read(1, writer.write(1, batch))


@given(st.floats(-9999, 0, width=32), st.floats(-9999, 0, width=32))
def test_logprobs_keep_their_bits(first: float, second: float) -> None:
    entry = TokenLogprob(3, first, ((3, first), (9, second)))
    floats = np.array([first, second], np.float32)
    scores = PromptScores(
        5,
        np.array([3, 4], np.int32),
        floats,
        np.array([1, 7], np.int32),
        np.array([[3], [9]], np.int32),
        floats[:, None],
    )
    results = [Sampled(1, 3, entry, scores), Sampled(2, None)]
    assert decode_results(encode_results(results)) == results


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\x05ab", pb.Batch(decode=[pb.Slice(token_ids=b"abc")]).SerializeToString()]
)
def test_bytes_that_are_no_batch_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        BatchReader().read(1, data)


def test_a_batch_is_split_by_pool_with_block_ids_of_its_own() -> None:
    batch = Batch(
        (SequenceSlice(1, [5] * 70, 0, [11, 13]), SequenceSlice(2, [6], 0, [3])), (SequenceSlice(3, [7], 64, [18, 10]),)
    )
    first, second = split_by_pool(batch, 2, 10)
    assert [(s.sequence_id, list(s.block_table)) for s in first.prefill] == [(2, [3])] and not first.decode
    assert [(s.sequence_id, list(s.block_table)) for s in (*second.prefill, *second.decode)] == [
        (1, [1, 3]), (3, [8, 0]),
    ]  # fmt: skip
    for table in ([3, 12], [3], [25, 26]):
        with pytest.raises(IndexError):
            split_by_pool(Batch((SequenceSlice(1, [5] * 70, 0, table),)), 2, 10)
