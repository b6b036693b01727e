"""Constrained sequences: what may follow is a function of their tokens alone, whatever becomes of them; tested without a model."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from builders import (
    fake_runner,
    generate_alone,
    hand_over,
    make_engine,
    make_request,
    run_to_end,
    tokens_of,
)
from byte_tokens import EOS, TOKENS, vocabulary
from test_engine_migration import Move

from workers.engine.engine import Engine
from workers.engine.fake_runner import LateFakeRunner
from workers.errors import InvalidRequest, InvariantViolated, Refusal
from workers.grammar.grammars import MAX_KEPT, Grammars
from workers.kv_memory.memory import KvMemory
from workers.request import FinishReason, Output, Request, ThinkingBudget
from workers.runner import SampleSpec
from workers.sampling.constraint import mask_of, tokens_in, without
from workers.sampling.edits import edits_of
from workers.wire.request_protobuf import params_from_pb, request_from_pb, request_to_pb

OBJECT = (
    'start: %json {"type": "object", "properties": {"name": {"type": "string", "minLength": 12, "maxLength": 40}, '
    '"tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 6}}, '
    '"required": ["name", "tags"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}'
)
LETTERS = "start: /[a-f]{70,90}/"


def constrained(
    seed: int = 0, grammar: str = OBJECT, prompt: int = 70, max_tokens: int = 300, **params: Any
) -> Request:
    return make_request(
        range(10, 10 + prompt), max_tokens=max_tokens, temperature=1.0, seed=seed, grammar=grammar, **params
    )


def text_of(outputs: list[tuple[int, Output]], sequence_id: int) -> str:
    return TOKENS.text(tokens_of(outputs, sequence_id))


def end_of(outputs: list[tuple[int, Output]], sequence_id: int) -> FinishReason | None:
    return next(o.finish_reason for owner, o in reversed(outputs) if owner == sequence_id)


def run(*requests: Request, **limits: Any) -> list[tuple[int, Output]]:
    engine = make_engine(fake_runner(32), vocabulary=vocabulary(), **limits)
    for number, request in enumerate(requests):
        engine.add(number, request)
    outputs = run_to_end(engine)
    assert engine.num_held_blocks == 0
    return outputs


def test_an_answer_is_what_its_grammar_says_and_ends_where_it_ends() -> None:
    outputs = run(constrained(3), constrained(4, LETTERS), constrained(5, 'start: "yes" | "no"'))
    value = json.loads(text_of(outputs, 0))
    assert 12 <= len(value["name"]) <= 40 and set(value["tags"]) <= {"red", "green"}
    assert 70 <= len(text_of(outputs, 1)) <= 90 and set(text_of(outputs, 1)) <= set("abcdef")
    assert text_of(outputs, 2) in ("yes", "no")
    assert {end_of(outputs, number) for number in range(3)} == {FinishReason.STOP}


def test_tokens_do_not_depend_on_company_and_a_batch_without_grammars_is_as_before() -> None:
    jobs = [constrained(seed, OBJECT if seed % 2 else LETTERS, prompt=60 + seed) for seed in range(4)]
    jobs.insert(2, make_request(range(10, 90), max_tokens=40, temperature=1.0, seed=9))
    outputs = run(*jobs, max_batch_tokens=100)
    for number, request in enumerate(jobs):
        assert tokens_of(outputs, number) == generate_alone(request)


def test_an_overlapping_engine_draws_the_same() -> None:
    jobs = [constrained(seed, grammar) for seed, grammar in enumerate((OBJECT, LETTERS))]
    engine = make_engine(LateFakeRunner(KvMemory(fake_runner(32).kv_memory.layout)), vocabulary=vocabulary())
    for number, request in enumerate(jobs):
        engine.add(number, request)
    outputs = run_to_end(engine)
    for number, request in enumerate(jobs):
        assert tokens_of(outputs, number) == generate_alone(request)


@pytest.mark.parametrize("num_given", [1, 30])
def test_a_replay_goes_on_where_its_grammar_stands(num_given: int) -> None:
    request = constrained(6)
    golden = generate_alone(request)
    again = constrained(6)
    again = Request(again.request_id, again.prompt_token_ids, again.params, 0, tuple(golden[:num_given]))
    assert tokens_of(run(again), 0) == golden[num_given:]


def test_a_preempted_sequence_keeps_its_grammar() -> None:
    jobs = [constrained(seed, "start: /[a-f]{150,160}/", prompt=60) for seed in range(4)]
    engine = make_engine(fake_runner(10), vocabulary=vocabulary())
    for number, request in enumerate(jobs):
        engine.add(number, request)
    outputs = run_to_end(engine)
    assert dict(engine.counters())["preemptions"] > 0
    for number, request in enumerate(jobs):
        assert tokens_of(outputs, number) == generate_alone(request)


def test_the_first_token_drawn_by_a_prefill_worker_is_constrained_too() -> None:
    runners = fake_runner(), fake_runner()
    source, target = (make_engine(runner, vocabulary=vocabulary()) for runner in runners)
    request = constrained(8, 'start: "x" /[a-f]{20,30}/')
    hand_over(runners[0], source, runners[1], target, request)
    outputs = run_to_end(target)
    assert tokens_of(outputs, 1) == generate_alone(request)
    assert text_of(outputs, 1)[0] == "x"


@pytest.mark.parametrize("num_steps", [3, 40])
def test_a_sequence_that_moves_takes_its_grammar_along(num_steps: int) -> None:
    request = constrained(5, "start: /[a-f]{150,160}/", prompt=200)
    move = Move()
    move.source.add(1, request)
    while len(tokens_of(move.outputs, 1)) < num_steps:
        move.run(1)
    move.begin(request)
    move.run(5)
    move.source.moves.halt(1)
    move.run(3)
    move.land()
    arrived = move.finish()
    assert tokens_of(move.outputs, 1) + tokens_of(arrived, 9) == generate_alone(request)


def test_a_sequence_waits_for_its_grammar_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = Grammars._matcher

    def slow(self: Grammars, grammar: str) -> Any:
        gate.wait(30)
        return real(self, grammar)

    monkeypatch.setattr(Grammars, "_matcher", slow)
    engine = make_engine(vocabulary=vocabulary())
    waiting, free = constrained(1, prompt=130), make_request(range(10, 80), max_tokens=20)
    engine.add(0, waiting)
    engine.add(1, free)
    outputs: list[tuple[int, Output]] = []
    while not outputs or outputs[-1][1].finish_reason is None:
        outputs += engine.step().outputs
    assert {owner for owner, _ in outputs} == {1} and tokens_of(outputs, 1) == generate_alone(free)
    gate.set()
    outputs += run_to_end(engine)
    monkeypatch.undo()
    assert tokens_of(outputs, 0) == generate_alone(waiting)


def refused(engine: Engine, request: Request) -> str:
    engine.add(0, request)
    (_, output), *others = run_to_end(engine)
    assert output.refusal is Refusal.INVALID and not others and engine.num_held_blocks == 0
    return output.message


def test_what_is_no_grammar_ends_its_own_request_alone() -> None:
    engine = make_engine(vocabulary=vocabulary())
    assert "unknown name" in refused(engine, constrained(grammar="start: nobody"))
    assert "Unimplemented keys" in refused(engine, constrained(grammar='start: %json {"not": {}}'))
    assert "not follow" in refused(engine, constrained(grammar="start: /[0-9]+/", replay=TOKENS.encode("x")))
    assert tokens_of(run(constrained(2)), 0) == generate_alone(constrained(2))


def test_a_worker_that_reads_no_grammars_refuses_them() -> None:
    with pytest.raises(InvalidRequest, match="llguidance"):
        make_engine().add(0, constrained())


def test_where_a_grammar_must_end_the_output_ends_whatever_else_was_asked_for() -> None:
    jobs = [
        constrained(1, 'start: "ab"', min_tokens=9),
        constrained(1, 'start: "ab"', ignore_eos=True),
        constrained(1, "start: /[a-c]+/", ignore_eos=True, max_tokens=30),
        constrained(1, "start: /[a-c]*/", min_tokens=12, max_tokens=200),
        constrained(1, 'start: "ab"', bad_words=tuple((t,) for t in (*TOKENS.encode("ab"), 267))),
    ]
    outputs = run(*jobs)
    assert [text_of(outputs, n) for n in (0, 1, 4)] == ["ab"] * 3
    assert end_of(outputs, 2) is FinishReason.LENGTH and len(tokens_of(outputs, 2)) == 30
    assert len(tokens_of(outputs, 3)) >= 12 and end_of(outputs, 3) is FinishReason.STOP


def test_biases_and_stop_tokens_work_within_a_grammar() -> None:
    (a, b) = TOKENS.encode("ab")
    words = make_request(range(10, 80), 20, grammar="start: /[a-c]+/", bad_words=((a,), (b,)))
    assert not {a, b} & set(tokens_of(run(words), 0))
    stopped = constrained(1, "start: /[ab]{40}/", stop_token_ids=(a, b))
    assert end_of(run(stopped), 0) is FinishReason.STOP


def test_allowed_tokens_are_all_that_is_drawn_but_for_the_end() -> None:
    allowed = (100, 200, 300)
    outputs = run(make_request(range(10, 80), 40, temperature=1.0, allowed_token_ids=allowed))
    assert set(tokens_of(outputs, 0)) <= {*allowed, EOS}
    both = run(constrained(1, "start: /[a-f]{9}/", allowed_token_ids=tuple(TOKENS.encode("ab"))))
    assert set(text_of(both, 0)) <= set("ab") and len(text_of(both, 0)) == 9


def test_thinking_that_has_used_its_budget_up_is_closed_and_other_thinking_is_left_alone() -> None:
    closing, free = (700, 7, 701), make_request(range(10, 80), 30, temperature=1.0, seed=4)
    budget = ThinkingBudget(num_tokens=9, end_token_id=7, closing=closing)
    limited = make_request(range(10, 80), 30, temperature=1.0, seed=4, thinking=budget)
    tokens = tokens_of(run(limited), 0)
    assert tokens[:9] == generate_alone(free)[:9] and tuple(tokens[9:12]) == closing and len(tokens) == 30
    ended = ThinkingBudget(9, generate_alone(free)[5], (generate_alone(free)[5],))
    assert tokens_of(run(make_request(range(10, 80), 30, temperature=1.0, seed=4, thinking=ended)), 0) == (
        generate_alone(free)
    )
    golden = generate_alone(free)
    for start in (golden[0], golden[0] + 1):
        own = ThinkingBudget(4, 7, closing, start)
        tokens = tokens_of(run(make_request(range(10, 80), 30, temperature=1.0, seed=4, thinking=own)), 0)
        assert (tuple(tokens[5:8]) == closing) == (start == golden[0]) and tokens[:5] == golden[:5]
    at_once = ThinkingBudget(0, 7, closing)
    assert tuple(tokens_of(run(make_request(range(10, 80), 4, thinking=at_once)), 0)[:3]) == closing


def test_grammars_are_read_once_while_they_are_kept() -> None:
    grammars = Grammars(vocabulary(), 1000, (EOS,), clock=lambda: 0.0)
    for number in range(MAX_KEPT + 5):
        grammars.begin(number, constrained(grammar=f'start: "{number}"').params)
        while not grammars.poll(0.0) and grammars.wait(1.0):
            pass
    assert len(grammars._kept) == MAX_KEPT
    grammars.close()


def test_a_host_that_starts_no_more_threads_reads_grammars_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(vocabulary=vocabulary())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    engine.add(0, constrained(grammar='start: "yes"'))
    assert text_of(run_to_end(engine), 0) == "yes"


def test_a_grammar_that_takes_too_long_is_given_up() -> None:
    engine = make_engine(vocabulary=vocabulary())
    grammars = engine._grammars
    grammars.begin(7, constrained(grammar="start: /(a|b){1,9}/").params)
    ((number, why),) = _poll_late(grammars)
    assert number == 7 and "within" in why


def _poll_late(grammars: Grammars) -> list[tuple[int, str]]:
    grammars._pool.shutdown(wait=True)
    constraint = grammars.waiting[7].constraint
    constraint._matcher = None  # as long as the thread has not come to it
    return grammars.poll(1e9)


def test_too_much_work_is_refused_by_count_not_by_time() -> None:
    assert not vocabulary().problem_of(OBJECT)
    nested = "start: " + "(" * 5000 + '"a"' + ")" * 5000
    assert vocabulary().problem_of("start: /(a{1,1000}){1,1000}b(c{1,1000}){1,1000}/ | " + nested[7:])


def test_a_request_with_a_grammar_says_nothing_to_a_worker_that_does_not_know_grammars() -> None:
    budget = ThinkingBudget(3, 7, (1, 7))
    for request in (constrained(1), make_request([1], thinking=budget), make_request([1], allowed_token_ids=(3,))):
        message = request_to_pb(request)
        assert request_from_pb(message) == request
        with pytest.raises(InvalidRequest, match="max_tokens"):
            params_from_pb(message.params).validate(1000)


def test_masks_hold_the_tokens_they_were_made_of() -> None:
    tokens = [0, 31, 32, 33, 99]
    assert tokens_in(mask_of(tokens, 100)).tolist() == tokens
    assert tokens_in(without(mask_of(tokens, 100), mask_ids(31, 50))).tolist() == [0, 32, 33, 99]
    assert tokens_in(without(mask_of([5], 100), mask_ids(5))).tolist() == [5]


def mask_ids(*ids: int) -> Any:
    return tokens_in(mask_of(ids, 100))


def test_a_draw_without_its_mask_is_a_fault() -> None:
    with pytest.raises(InvariantViolated):
        edits_of(SampleSpec(constrained().params, 0, 0, (), ()))
