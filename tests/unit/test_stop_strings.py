"""A stream ends at its first stop string, however many there are and however the text is cut into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import InvalidRequest
from workers.request import MAX_BAD_WORD_TOKENS, MAX_ENTRIES, MAX_STOP_CHARACTERS, SamplingParams
from workers.text.output import StopMatch, StopStrings, _Automaton

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


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("stop", tuple(str(i) for i in range(MAX_ENTRIES + 1)), "strings"),
        ("stop", ("x" * (MAX_STOP_CHARACTERS + 1),), "characters"),
        ("stop_token_ids", tuple(range(MAX_ENTRIES + 1)), "tokens"),
        ("bad_words", tuple((i,) for i in range(2 * MAX_ENTRIES + 1)), "sequences"),
        ("bad_words", ((1,) * (MAX_BAD_WORD_TOKENS + 1),), "tokens"),
        ("logit_bias", tuple((i, 1.0) for i in range(MAX_ENTRIES + 1)), "tokens"),
        ("logit_bias", ((5, 1.0), (5, 2.0)), "twice"),
    ],
)
def test_a_list_that_would_slow_down_every_token_is_refused(field: str, value: object, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as refused:
        SamplingParams(**{field: value}).validate(103_424)  # type: ignore[arg-type]
    assert refused.value.param == field


def test_lists_as_long_as_they_may_be_are_taken() -> None:
    SamplingParams(
        stop=tuple(f"{i:04}" for i in range(MAX_ENTRIES)),
        stop_token_ids=tuple(range(MAX_ENTRIES)),
        bad_words=tuple((i, 3) for i in range(2 * MAX_ENTRIES)),
        logit_bias=tuple((i, 1.0) for i in range(MAX_ENTRIES)),
    ).validate(103_424)
