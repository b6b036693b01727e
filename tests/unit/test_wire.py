"""Everything that crosses the wire comes back as it went in, and block names depend on the whole prefix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import InvariantViolated, Refusal, TransferFailed
from workers.handoff import protobuf as handoff_wire
from workers.handoff.protocol.messages import (
    CancelHandoff,
    HandoffAccepted,
    HandoffRefused,
    KvPiece,
    KvPieces,
    Offer,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    PrefixDone,
    PrefixSubject,
    PromptSubject,
    ReleaseHandoff,
    RunningSubject,
    SequenceMoved,
    TransportBroken,
    UseTransport,
)
from workers.kv_cache.block_hash import PromptTokens, block_hashes
from workers.kv_memory.memory import KvLayout
from workers.pb import worker_pb2 as pb
from workers.request import FinishReason, HandoffReport, Output, Request, SamplingParams
from workers.status import KvEvent, Load, ModelInfo, PrefixHint, Role, Tier, WorkerAddress, WorkerStatus
from workers.token_logprobs import PromptScores, TokenLogprob
from workers.wire import attach_protobuf as wire
from workers.wire import request_protobuf as wire_request
from workers.wire.attach import (
    Adopt,
    Cancel,
    DumpRequest,
    Find,
    Found,
    FoundRequest,
    Kept,
    Migration,
    RouterHello,
    Submit,
    Waits,
    WorkerFrame,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
f64 = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(0, allow_nan=False, allow_infinity=False)
f32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def tuples(values: st.SearchStrategy[Any], max_size: int = 4) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=max_size).map(tuple)


params = st.builds(
    SamplingParams,
    max_tokens=u32,
    min_tokens=u32,
    temperature=f64,
    top_p=f64,
    top_k=u32,
    min_p=f64,
    presence_penalty=f64,
    frequency_penalty=f64,
    repetition_penalty=f64,
    seed=i64,
    logit_bias=tuples(st.tuples(u32, f32)),
    bad_words=tuples(tuples(u32)),
    stop=tuples(text),
    stop_token_ids=tuples(u32),
    ignore_eos=st.booleans(),
    include_stop=st.booleans(),
    skip_special_tokens=st.booleans(),
    logprobs=st.none() | u32,
    prompt_logprobs=st.none() | u32,
    logprob_token_ids=tuples(u32),
)
requests = st.builds(
    Request,
    request_id=text,
    prompt_token_ids=tuples(u32, 20),
    params=params,
    choice_index=u32,
    replay_token_ids=tuples(u32, 20),
    priority=st.integers(-(2**31), 2**31 - 1),
    traceparent=text,
)
logprobs = st.builds(TokenLogprob, token_id=u32, logprob=f32, top=tuples(st.tuples(u32, f32)), rank=st.none() | u32)


@st.composite
def scores(draw: st.DrawFn) -> PromptScores:
    num, top = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=num * (2 + top), max_size=num * (2 + top)))
    floats = draw(st.lists(f32, min_size=num * (1 + top), max_size=num * (1 + top)))
    i4, f4 = np.array(ids, np.int32), np.array(floats, np.float32)
    tops = i4[2 * num :].reshape(num, top), f4[num:].reshape(num, top)
    return PromptScores(draw(u32), i4[:num], f4[:num], i4[num : 2 * num], *tops)


reports = st.builds(
    HandoffReport,
    prefill_worker=text,
    decode_worker=text,
    transport=text,
    kv_bytes=u64,
    transfer_s=seconds,
    prefill_s=seconds,
    attempts=u32,
    wait_s=seconds,
    exposed_s=seconds,
    resends=u32,
    degradations=u32,
    recovery=text,
    queue_s=seconds,
)
progress = {
    "request_id": text,
    "position": u32,
    "token_ids": tuples(u32),
    "text": text,
    "logprobs": tuples(logprobs),
    "cached_tokens": u32,
    "prompt_logprobs": tuples(scores()),
    "handoff": st.none() | reports,
}
no_end = {"finish_reason": st.none(), "stop_reason": st.none(), "refusal": st.none(), "message": st.just("")}
outputs = st.builds(Output, **progress, **no_end) | st.builds(
    Output,
    **progress,
    finish_reason=st.sampled_from(FinishReason),
    stop_reason=st.none() | u32 | text,
    refusal=st.none() | st.sampled_from(Refusal),
    message=text,
)
addresses = st.builds(WorkerAddress, worker_id=text, generation=u64, target=text)
hints = st.builds(PrefixHint, addresses, u32)
loads = st.builds(Load, *[u32] * 3, u64, u32, u32, seconds, u32, u64, u32, u64)
kv_events = st.builds(KvEvent, u64, tuples(u64), tuples(u64), st.booleans(), tuples(st.sampled_from(Tier)))
models = st.builds(ModelInfo, text, text, *[st.integers(1, 2**32 - 1)] * 3)
statuses = st.builds(
    WorkerStatus,
    text,
    u64,
    st.sampled_from(Role),
    models,
    loads,
    u32,
    text,
    u64,
    counters=tuples(st.tuples(text, f64)),
    is_draining=st.booleans(),
)
layouts = st.builds(KvLayout, *[u32] * 5, text, u32)
subjects = (
    st.builds(PromptSubject, requests, st.none() | hints)
    | st.builds(RunningSubject, text)
    | st.builds(PrefixSubject, tuples(u64), tuples(u32), u64)
)
pieces = st.builds(KvPiece, *[u32] * 5, u64)
openings = st.builds(OpenHandoff, addresses, text, u64, text, layouts, subjects, u32, u32, tuples(text))
handoff_downs = (
    openings
    | st.builds(UseTransport, text, u32)
    | st.builds(PieceAck, tuples(u32))
    | st.just(ReleaseHandoff())
    | st.builds(CancelHandoff, text)
)
handoff_ups = (
    st.builds(HandoffAccepted, tuples(st.builds(Offer, text, st.binary(max_size=20))), layouts, text)
    | st.builds(KvPieces, tuples(pieces), u32)
    | st.builds(TransportBroken, u32, text)
    | st.builds(PrefillDone, u32, st.none() | logprobs, u32, u32, seconds)
    | st.builds(SequenceMoved, tuples(u32), u32, u32)
    | st.builds(PrefixDone, u32, u32)
    | st.builds(HandoffRefused, st.sampled_from(Refusal), text)
    | st.builds(CancelHandoff, text)
)
found_requests = st.builds(FoundRequest, text, u32, u32, u32, st.none() | st.sampled_from(FinishReason), st.booleans())
founds = st.builds(Found, u64, tuples(found_requests), u32, st.binary(max_size=20), st.booleans())
frames = st.builds(
    WorkerFrame,
    u64,
    tuples(outputs),
    st.none() | loads,
    tuples(kv_events),
    st.none() | statuses,
    tuples(founds),
    tuples(text),
)
router_messages = (
    st.builds(
        Submit,
        requests,
        u64,
        tuples(addresses),
        f64,
        f64,
        st.none() | st.builds(Migration, addresses, text),
        st.none() | hints,
        text,
        kept=st.none()
        | st.builds(Kept, st.text("abc", min_size=1, max_size=20), u32, st.binary(max_size=20), st.booleans()),
        cached_tokens=u32,
    )
    | st.builds(Adopt, text, text, u32, joins=st.booleans())
    | st.builds(Cancel, text, st.booleans())
    | st.builds(Find, u64, text, st.booleans(), st.booleans())
    | st.builds(Waits, st.text("abc", min_size=1, max_size=20), u32, st.binary(max_size=20))
    | st.just(DumpRequest())
    | st.builds(RouterHello, text)
)

PAIRS: dict[str, tuple[st.SearchStrategy[Any], Any, Any]] = {
    "request": (requests, wire_request.request_to_pb, wire_request.request_from_pb),
    "handoff_report": (reports, wire_request.handoff_report_to_pb, wire_request.handoff_report_from_pb),
    "logprob": (logprobs, wire_request.token_logprob_to_pb, wire_request.token_logprob_from_pb),
    "output": (outputs, wire_request.output_to_pb, wire_request.output_from_pb),
    "address": (addresses, wire.address_to_pb, wire.address_from_pb),
    "load": (loads, wire.load_to_pb, wire.load_from_pb),
    "kv_event": (kv_events, wire.kv_event_to_pb, wire.kv_event_from_pb),
    "model": (models, wire.model_to_pb, wire.model_from_pb),
    "status": (statuses, wire.status_to_pb, wire.status_from_pb),
    "layout": (layouts, wire.layout_to_pb, wire.layout_from_pb),
    "handoff_down": (handoff_downs, partial(handoff_wire.down_to_pb, "t", 7), handoff_wire.down_from_pb),
    "handoff_up": (handoff_ups, partial(handoff_wire.up_to_pb, "t", 7), handoff_wire.up_from_pb),
    "frame": (frames, wire.frame_to_pb, wire.frame_from_pb),
    "router_message": (router_messages, wire.router_message_to_pb, wire.router_message_from_pb),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_value_survives_the_wire(name: str) -> None:
    values, to_pb, from_pb = PAIRS[name]

    @settings(max_examples=40, deadline=None)
    @given(values)
    def survives(value: Any) -> None:
        message = to_pb(value)
        assert from_pb(type(message).FromString(message.SerializeToString())) == value

    survives()


def test_a_request_without_a_concrete_seed_does_not_leave() -> None:
    with pytest.raises(InvariantViolated):
        wire_request.request_to_pb(Request("r", (1,), SamplingParams()))


def test_a_refusal_of_a_newer_peer_counts_as_internal() -> None:
    message = pb.Output(request_id="r", finish_reason="error", refusal="solar_flare")
    assert wire_request.output_from_pb(message).refusal is Refusal.INTERNAL


def test_an_empty_router_message_is_refused() -> None:
    with pytest.raises(ValueError, match="not known"):
        wire.router_message_from_pb(pb.RouterMessage())


def test_a_handoff_message_of_an_unknown_kind_fails_the_transfer() -> None:
    with pytest.raises(TransferFailed, match="unknown kind"):
        handoff_wire.down_from_pb(pb.HandoffDown())
    with pytest.raises(TransferFailed, match="unknown kind"):
        handoff_wire.up_from_pb(pb.HandoffUp())
    with pytest.raises(TransferFailed, match="unknown kind"):
        handoff_wire.down_from_pb(pb.HandoffDown(open=pb.OpenHandoff()))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 8), u64)
def test_a_block_hash_names_the_whole_prefix(tokens: list[int], block_size: int, salt: int) -> None:
    expected = []
    parent = salt
    for end in range(block_size, len(tokens) + 1, block_size):
        data = parent.to_bytes(8, "little")
        for token in tokens[end - block_size : end]:
            data += token.to_bytes(4, "little")
        parent = xxhash.xxh3_64_intdigest(data)
        expected.append(parent)
    assert block_hashes(tokens, block_size, salt) == expected


def test_prompts_with_a_common_prefix_share_its_blocks_and_no_more() -> None:
    one = block_hashes([1, 2, 3, 4, 5, 6], 2)
    other = block_hashes([1, 2, 3, 9, 5, 6], 2)
    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])
    assert not set(one) & set(block_hashes([1, 2, 3, 4, 5, 6], 2, salt=1))


class Looked(PromptTokens):
    """A prompt that counts how often its tokens are read."""

    num_looks = 0

    def __iter__(self) -> Iterator[int]:
        Looked.num_looks += 1
        return super().__iter__()


def test_choices_of_a_request_have_their_prompt_written_once() -> None:
    prompt = Looked(range(3000))
    choices = [Request(f"r{at}", prompt, SamplingParams(seed=at), choice_index=at) for at in range(128)]
    written = [wire_request.request_to_pb(choice) for choice in choices]
    assert Looked.num_looks <= 1
    assert [wire_request.request_from_pb(message) for message in written] == choices
