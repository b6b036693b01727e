"""A stream ends at its first stop string, however many there are and however the text is cut into tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import make_engine
from fake_backend import open_api
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings import build
from workers.config import WorkerConfig
from workers.errors import InvalidConfig, InvalidRequest
from workers.limits import DEFAULT_LIMITS, MAX_ENTRIES, RequestLimits
from workers.pb import worker_pb2 as pb
from workers.request import Request, SamplingParams
from workers.status import ModelInfo
from workers.text.output import StopMatch, StopStrings, _Automaton
from workers.wire.attach_protobuf import model_from_pb, model_to_pb

WORDS = st.text("ab€", min_size=1, max_size=5)


def by_searching(stops: list[str], pieces: list[str], include: bool) -> list[str | StopMatch]:
    """What is delivered for each piece, found with `str.find` and `str.startswith`."""
    delivered: list[str | StopMatch] = []
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.find(stop), -len(stop), stop) for stop in stops if stop in held]
        if found:
            start, negative_length, stop = min(found)
            return [*delivered, StopMatch(held[: start - negative_length if include else start], stop)]
        endings = [held[start:] for start in range(len(held) + 1)]
        kept = next(end for end in endings if any(stop.startswith(end) for stop in stops))
        delivered.append(held[: len(held) - len(kept)])
        held = kept
    return [*delivered, held]


@given(
    st.lists(WORDS, min_size=1, max_size=6, unique=True),
    st.lists(st.text("ab€", max_size=6), max_size=8),
    st.booleans(),
)
def test_text_is_delivered_held_back_and_ended_as_by_searching(
    stops: list[str], pieces: list[str], include: bool
) -> None:
    stream = StopStrings(stops, include)
    delivered: list[str | StopMatch] = []
    for piece in pieces:
        delivered.append(stream.push(piece))
        if isinstance(delivered[-1], StopMatch):
            break
    else:
        delivered.append(stream.flush())
    assert delivered == by_searching(stops, pieces, include)


def test_a_thousand_stop_strings_hold_back_what_may_become_one_of_them() -> None:
    stops = [f"<end {number}>" for number in range(1000)]
    stream = StopStrings(stops)
    assert stream.push("text <en") == "text "
    assert stream.push("d 99") == ""
    assert stream.push("9> more") == StopMatch("", "<end 999>")
    assert StopStrings(stops).push("<end 1x> <") == "<end 1x> "


def test_a_character_costs_a_few_looks_at_the_automaton_however_many_stop_strings_there_are() -> None:
    class Counting(dict[tuple[int, str], int]):
        num_looks = 0

        def get(self, key: tuple[int, str], default: int | None = None) -> int | None:  # type: ignore[override]
            self.num_looks += 1
            return super().get(key, default)

    looks = {}
    for num_stops in (1, 1000):
        automaton = _Automaton([f"aab{number}" for number in range(num_stops)])
        counting = automaton._next = Counting(automaton._next)
        state = 0
        for character in "aabaaabb" * 100:
            state = automaton.step(state, character)
        looks[num_stops] = counting.num_looks
    assert looks[1] == looks[1000] <= 2 * 800


MANY = DEFAULT_LIMITS.stop_strings


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("stop", tuple(str(i) for i in range(MANY + 1)), "strings"),
        ("stop", ("x" * (DEFAULT_LIMITS.stop_characters + 1),), "characters"),
        ("stop_token_ids", tuple(range(MANY + 1)), "tokens"),
        ("bad_words", tuple((i,) for i in range(2 * MANY + 1)), "sequences"),
        ("bad_words", ((1,) * (DEFAULT_LIMITS.bad_word_tokens + 1),), "tokens"),
        ("logit_bias", tuple((i, 1.0) for i in range(MANY + 1)), "tokens"),
        ("logit_bias", ((5, 1.0), (5, 2.0)), "twice"),
    ],
)
def test_a_list_that_would_slow_down_every_token_is_refused(field: str, value: object, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as refused:
        SamplingParams(**{field: value}).validate(103_424)  # type: ignore[arg-type]
    assert refused.value.param == field


def test_lists_as_long_as_they_may_be_are_taken() -> None:
    SamplingParams(
        stop=tuple(f"{i:04}" for i in range(MANY)),
        stop_token_ids=tuple(range(MANY)),
        bad_words=tuple((i, 3) for i in range(2 * MANY)),
        logit_bias=tuple((i, 1.0) for i in range(MANY)),
    ).validate(103_424)


def test_limits_are_settings_that_hold_at_the_worker_and_are_told_to_routers() -> None:
    limits = RequestLimits(stop_strings=2, stop_characters=5, bad_words=1, logit_bias=0)
    config = WorkerConfig(model="fake", limits=limits)
    assert build(WorkerConfig, {"model": "fake", "limits": {"stop_strings": "2"}}, "worker").limits.stop_strings == 2
    with pytest.raises(InvalidConfig, match=r"worker\.limits\.stop_strings must be at most"):
        build(WorkerConfig, {"model": "fake", "limits": {"stop_strings": MAX_ENTRIES + 1}}, "worker")
    info = replace(ModelInfo("m", "f", 1000, 4096, 64), limits=config.limits)
    assert model_from_pb(pb.ModelInfo.FromString(model_to_pb(info).SerializeToString())) == info
    for params in (
        SamplingParams(stop=("a", "b", "c")),
        SamplingParams(stop=("aaaaaa",)),
        SamplingParams(bad_words=((1,), (2,), (3,))),
        SamplingParams(logit_bias=((5, 1.0),)),
    ):
        params.validate(1000)
        with pytest.raises(InvalidRequest, match="takes at most"):
            params.validate(1000, limits)
        engine = make_engine(request_limits=limits)
        with pytest.raises(InvalidRequest, match="takes at most"):
            engine.check(Request("r", (1, 2), params.with_seed(1)))


def test_the_api_refuses_what_the_workers_would_refuse() -> None:
    with open_api() as api:
        api.backend.model = replace(api.backend.model, limits=RequestLimits(stop_strings=2, bad_words=1))
        for field, good, bad in (("stop", ["a", "b"], ["a", "b", "c"]), ("bad_words", ["a"], ["a", "b"])):
            body = {"prompt": "Hi", "max_tokens": 2}
            assert api.http.post("/v1/completions", json=body | {field: good}).status_code == 200
            refused = api.http.post("/v1/completions", json=body | {field: bad})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == field
            assert "takes at most" in refused.json()["error"]["message"]
