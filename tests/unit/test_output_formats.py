"""Reasoning, answers and tool calls are read from a model's text, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.formats.formats import NONE, OutputFormat, check_parsers, output_format
from router.api.formats.reader import CallArguments, CallStarted, Content, OutputReader, Part, Reasoning
from workers.errors import InvalidConfig

X1 = output_format("ernie-x1", "ernie-x1", "")
VL = output_format("ernie-45-vl-thinking", "ernie-45-vl-thinking", "")
HERMES = output_format(NONE, "hermes", "")
PLAIN = OutputFormat()


def read(
    form: OutputFormat, pieces: list[str], opens_reasoning: bool = False, max_calls: int = 128
) -> dict[str, object]:
    """Everything that was given out, joined by kind."""
    reader = OutputReader(form, opens_reasoning, max_calls)
    parts: list[Part] = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallStarted):
            assert part.index == len(calls)
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            assert part.index == len(calls) - 1
            calls[-1][1] += part.text
    return {
        "reasoning": "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "content": "".join(part.text for part in parts if isinstance(part, Content)),
        "calls": calls,
    }


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>\n"


ANSWERS = [
    (X1, True, "I think.\n</think>\n\n\n<response>\nHello\nthere.\n</response>\n", ("I think.", "Hello\nthere.", [])),
    (X1, True, "never ends", ("never ends", "", [])),
    (X1, False, "<think>\nhm\n</think>\n<response>yes</response>", ("hm", "yes", [])),
    (
        X1,
        True,
        "look it up\n</think>\n\n\n" + call("weather", {"city": "北京 {x} </tool_call>"}) + call("time", {}),
        (
            "look it up",
            "",
            [["weather", '{"city": "北京 {x} </tool_call>"}'], ["time", "{}"]],
        ),
    ),
    (VL, True, "a\n\nb</think>\nThe answer < 3\n", ("a\n\nb", "The answer < 3\n", [])),
    (
        HERMES,
        False,
        "  Sure:\n" + call("f", {"a": [1, {"b": "}"}]}),
        ("", "  Sure:", [["f", '{"a": [1, {"b": "}"}]}']]),
    ),
    (HERMES, False, '<tool_call>{"name":"f"}</tool_call>', ("", "", [["f", "{}"]])),
    (HERMES, False, '<tool_call>{"parameters": {"a":1} , "name" : "f"}</tool_call>', ("", "", [["f", '{"a":1}']])),
    (HERMES, False, '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', ("", "", [["f", '{"a": 1}']])),
    (HERMES, False, '<tool_call>{"name":"f","arguments":null,"id":7}</tool_call>', ("", "", [["f", "{}"]])),
    (HERMES, False, '<tool_call>{"name":"f","arguments":{"a":"cut of', ("", "", [["f", '{"a":"cut of']])),
    (HERMES, False, "\n<tool_call>no call</tool_call> after", ("", "\n<tool_call>no call</tool_call> after", [])),
    (HERMES, False, '<tool_call>{"arguments":{}}</tool_call>', ("", '<tool_call>{"arguments":{}}</tool_call>', [])),
    (HERMES, False, '<tool_call>{"name":"f",oops}</tool_call>end', ("", "end", [["f", ""]])),
    (HERMES, False, "<tool_cal", ("", "<tool_cal", [])),
    (PLAIN, False, "\n<think>a</think>" + call("f", {}), ("", "\n<think>a</think>" + call("f", {}), [])),
]


@pytest.mark.parametrize(("form", "opens", "text", "expected"), ANSWERS)
def test_an_answer_is_read_whole_and_letter_by_letter(
    form: OutputFormat, opens: bool, text: str, expected: tuple[str, str, list[list[str]]]
) -> None:
    wanted = dict(zip(("reasoning", "content", "calls"), expected, strict=True))
    assert read(form, [text], opens) == wanted
    assert read(form, list(text), opens) == wanted


PIECES = st.sampled_from(
    [*X1.tags, '{"name":"f","arguments":{', '"a":1', "}}", '"name":"g"', "text", "null", *'\n{}"\\,:<é []']
)


@given(
    st.sampled_from([X1, VL, HERMES, PLAIN]),
    st.booleans(),
    st.lists(PIECES, max_size=14).map("".join),
    st.lists(st.integers(0, 80), max_size=6),
)
def test_how_a_text_is_cut_changes_nothing(form: OutputFormat, opens: bool, text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert read(form, pieces, opens) == read(form, [text], opens)


@given(st.lists(PIECES, max_size=14).map("".join))
def test_a_model_without_tags_says_what_it_says(text: str) -> None:
    assert read(PLAIN, list(text)) == {"reasoning": "", "content": text, "calls": []}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.text(min_size=1), st.dictionaries(st.text(), JSON), st.booleans())
def test_arguments_come_out_as_they_were_written(name: str, arguments: dict[str, object], is_ascii: bool) -> None:
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=is_ascii)
    found = read(HERMES, list(f"<tool_call>{written}</tool_call>"))
    assert found["content"] == ""
    [(found_name, found_arguments)] = found["calls"]  # type: ignore[misc]
    assert found_name == name
    assert json.loads(found_arguments) == arguments


def test_without_tools_a_call_is_text() -> None:
    text = call("f", {"a": 1})
    assert read(replace(X1, call=None), list(text)) == {"reasoning": "", "content": text, "calls": []}


def test_calls_beyond_the_first_are_left_out_where_one_is_asked_for() -> None:
    assert read(HERMES, [call("f", {"a": 1}), call("g", {})], max_calls=1)["calls"] == [["f", '{"a": 1}']]


def test_what_may_be_a_tag_is_held_back_and_nothing_else_is() -> None:
    reader = OutputReader(X1, opens_reasoning=True, max_calls=8)
    assert reader.push("a < b") == [Reasoning("a < b")]
    assert reader.push("\n</thin") == []
    assert reader.push("g") == [Reasoning("\n</thing")]
    assert reader.is_reasoning
    assert reader.push("</think>\n<response>") == []
    assert not reader.is_reasoning


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", OutputFormat()),
        ("<think>\n", OutputFormat(reasoning=("<think>", "</think>"))),
        ("<think> <response> <tool_call>", X1),
        ("<tool_call>", HERMES),
    ],
)
def test_a_template_tells_how_its_model_writes(template: str, expected: OutputFormat) -> None:
    assert output_format("auto", "auto", template) == expected


def test_an_unknown_parser_is_refused_by_name() -> None:
    with pytest.raises(
        InvalidConfig, match=r"router\.api\.tool_parser must be auto or one of .*hermes.*, not 'hermse'"
    ):
        check_parsers("auto", "hermse")


def test_a_package_may_bring_a_format_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme-1.0.dist-info").mkdir()
    (tmp_path / "acme-1.0.dist-info" / "METADATA").write_text("Name: acme\nVersion: 1.0\n")
    (tmp_path / "acme-1.0.dist-info" / "entry_points.txt").write_text(
        "[baton.output_formats]\nacme = acme_format:FORMAT\nacme-odd = acme_format:ODD\nacme-lost = acme_format:LOST\n"
    )
    (tmp_path / "acme_format.py").write_text(
        "from router.api.formats.formats import OutputFormat\n"
        "FORMAT = OutputFormat(call=('<function>', '</function>'))\nODD = OutputFormat(call=('<function>', ''))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check_parsers(NONE, "acme")
    form = output_format(NONE, "acme", "")
    text = 'On it.<function>{"name": "f", "arguments": {"a": 1}}</function>'
    assert read(form, [text]) == read(HERMES, [text.replace("function>", "tool_call>")])
    for reasoning, tool, message in (
        ("acme", NONE, "has no tags for it"),
        (NONE, "acme-odd", "must be an OutputFormat"),
        (NONE, "acme-lost", "cannot be loaded"),
        (NONE, "acme-none", "installed entry point"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            check_parsers(reasoning, tool)
