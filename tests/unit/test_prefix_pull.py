"""When a prefix is worth pulling, what its holder gives, and that an engine uses no more than arrived."""

from __future__ import annotations

import random

import pytest
from builders import fake_runner, generate_alone, make_engine, make_request, run_to_end, step_until, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.engine import Engine
from workers.errors import Refused
from workers.handoff.protocol.choices import MEMORY_S, PullRates, is_worth_pulling
from workers.handoff.protocol.messages import PrefixSubject, keys_of, subject_of
from workers.kv_cache.block_hash import BlockKey, PromptBlocks
from workers.kv_tiers.tiers import KvTiers
from workers.runner import BLOCK_SIZE
from workers.scheduler.sequence import Kind
from workers.status import PrefixHint, WorkerAddress

PROMPT = make_request(range(5, 5 + 8 * BLOCK_SIZE + 9), 16, request_id="r")


GOLDEN = generate_alone(PROMPT)


PEER = WorkerAddress("peer", 1 << 32, "127.0.0.1:1")


def keys_of_prompt() -> tuple:  # type: ignore[type-arg]
    prompt = PromptBlocks.of(PROMPT.prompt_token_ids, BLOCK_SIZE)
    return tuple(prompt.key(i) for i in range(len(prompt.hashes)))


def test_pulling_is_worth_it_when_it_beats_computing_and_unknown_rates_are_tried() -> None:
    assert is_worth_pulling(1000, 10_000, prefill_tokens_per_s=100, pull_bytes_per_s=1001)
    assert not is_worth_pulling(1000, 10_000, prefill_tokens_per_s=100, pull_bytes_per_s=999)
    assert is_worth_pulling(1000, 10_000, prefill_tokens_per_s=0, pull_bytes_per_s=1)
    assert is_worth_pulling(1000, 10_000, prefill_tokens_per_s=100, pull_bytes_per_s=0)


def test_a_peer_that_fails_is_slow_for_a_while_and_then_tried_again() -> None:
    rates = PullRates()
    assert rates.rate("p", 0.0) == 0
    rates.note("p", 1000, 1.0, now=1.0)
    assert rates.rate("p", 1.0) == 1000
    rates.note("p", 0, 1.0, now=2.0)
    assert 0 < rates.rate("p", 2.0) < 1000
    assert rates.rate("p", 2.1 + MEMORY_S) == 0
    rates.note("q", 0, 1.0, now=2.0)
    assert not is_worth_pulling(64, 1000, prefill_tokens_per_s=1000, pull_bytes_per_s=rates.rate("q", 2.0))


@given(st.integers(1, 8), st.integers(0, 7))
def test_what_is_asked_for_is_what_the_holder_hears(count: int, first: int) -> None:
    keys = keys_of_prompt()[first : first + count]
    if keys:
        assert keys_of(subject_of(keys)) == keys


def test_hashes_without_their_tokens_are_refused() -> None:
    with pytest.raises(Refused, match="come with 0 tokens"):
        keys_of(PrefixSubject((1, 2)))


def hold(engine: Engine, export_id: int, keys: tuple[BlockKey, ...]) -> tuple[int, ...]:
    """The blocks that a holder says it holds."""
    engine.outgoing.hold_prefix(export_id, keys)
    early = engine.take_early()
    assert early is not None
    return early.held[-1].blocks


def test_a_holder_gives_only_what_is_exactly_asked_for_and_at_most_a_quarter_of_its_pool() -> None:
    engine = make_engine()
    engine.add(1, PROMPT)
    run_to_end(engine)
    keys = keys_of_prompt()
    assert len(hold(engine, 7, keys)) == 4 == engine.num_held_blocks
    assert hold(engine, 8, keys) == ()
    engine.outgoing.release_prefix(7)
    engine.outgoing.release_prefix(7)
    engine.outgoing.release_prefix(8)
    assert engine.num_held_blocks == 0
    spoiled = (keys[0], keys[1]._replace(tokens=bytes(4 * BLOCK_SIZE)), *keys[2:])
    assert len(hold(engine, 9, spoiled)) == 1
    engine.outgoing.release_prefix(9)


def test_a_cancelled_pull_keeps_its_blocks_until_the_writers_have_stopped() -> None:
    engine = make_engine()
    engine.add(1, PROMPT, Kind.SOURCE, PrefixHint(PEER, 6))
    (wanted,) = step_until(engine, "pulls").pulls
    assert (wanted.first_block, len(wanted.blocks), wanted.keys) == (0, 6, keys_of_prompt()[:6])
    engine.cancel(1)
    assert step_until(engine, "abandoned").abandoned == [1] and engine.num_held_blocks > 0
    engine.incoming.pulled(1, 6)
    assert engine.num_held_blocks == 0 and not engine.has_work


def test_only_what_arrived_is_used_and_published() -> None:
    donor, engine = make_engine(), make_engine()
    donor.add(1, PROMPT)
    run_to_end(donor)
    engine.add(1, PROMPT, Kind.LOCAL, PrefixHint(PEER, 6))
    (wanted,) = step_until(engine, "pulls").pulls
    held = hold(donor, 1, wanted.keys[:4])
    for ours, theirs in zip(wanted.blocks, held, strict=False):
        engine._runner.kv_memory.block(ours, 0, 2)[:] = donor._runner.kv_memory.block(theirs, 0, 2)
    engine.incoming.pulled(1, 4)
    engine.incoming.pulled(1, 6)
    outputs = run_to_end(engine)
    assert tokens_of(outputs, 1) == GOLDEN and outputs[0][1].cached_tokens == 4 * BLOCK_SIZE
    engine.add(2, PROMPT)
    assert tokens_of(run_to_end(engine), 2) == GOLDEN


def test_a_worker_does_not_ask_itself_nor_for_what_it_has() -> None:
    engine = make_engine()
    engine.add(1, PROMPT, Kind.LOCAL, PrefixHint(WorkerAddress("local", 1, "x"), 6))
    outputs = run_to_end(engine)
    engine.add(2, PROMPT, Kind.LOCAL, PrefixHint(PEER, 6))
    outputs += run_to_end(engine)
    assert tokens_of(outputs, 1) == tokens_of(outputs, 2) == GOLDEN


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_tokens_do_not_depend_on_what_a_peer_sends_when_or_whether(seed: int) -> None:
    """A donor answers late, in part, or not at all, from a pool under pressure; some requests are cancelled meanwhile."""
    rng = random.Random(seed)
    runner = fake_runner(12)
    donor = make_engine(fake_runner(12))
    engine = make_engine(runner, tiers=KvTiers(runner.kv_memory, rng.randint(0, 6)))
    requests = []
    for index in range(rng.randint(1, 8)):
        shared, length = rng.choice([64, 192, 320]), rng.randint(1, 400)
        family = rng.randint(0, 2)
        prompt = [(i + 300 * family if i < shared else 7 * i + index) % 990 + 5 for i in range(length)]
        requests.append(make_request(prompt, rng.randint(1, 20), seed=index))
    outputs, open_pulls, cancelled = [], [], set()
    pending = list(enumerate(requests))
    for _ in range(20_000):
        if pending and rng.random() < 0.5:
            index, request = pending.pop(0)
            if rng.random() < 0.5:
                donor.add(index, request)
                run_to_end(donor)
            engine.add(index, request, Kind.LOCAL, PrefixHint(PEER, rng.randint(0, 7)))
        result = engine.step()
        outputs += result.outputs
        open_pulls += result.pulls
        if open_pulls and rng.random() < 0.5:
            wanted = open_pulls.pop(rng.randint(0, len(open_pulls) - 1))
            blocks = hold(donor, wanted.sequence_id, wanted.keys)
            count = rng.randint(0, len(blocks))
            for ours, theirs in zip(wanted.blocks[wanted.first_block :], blocks[:count], strict=False):
                engine._runner.kv_memory.block(ours, 0, 2)[:] = donor._runner.kv_memory.block(theirs, 0, 2)
            donor.outgoing.release_prefix(wanted.sequence_id)
            if rng.randint(0, 4) == 0:
                cancelled.add(wanted.sequence_id)
                engine.cancel(wanted.sequence_id)
            engine.incoming.pulled(wanted.sequence_id, count)
        if not (pending or open_pulls or engine.has_work):
            break
    for index, request in enumerate(requests):
        if index not in cancelled:
            assert tokens_of(outputs, index) == generate_alone(request)
    assert engine.num_held_blocks == donor.num_held_blocks == 0
