"""Reads one tool call, a JSON object with a name and arguments, as its text arrives; knows neither tags nor HTTP."""

from __future__ import annotations

import json
from enum import Enum, auto

_BLANKS = " \t\r\n"
_NAMES = ("name",)
_ARGUMENTS = ("arguments", "parameters")


class _At(Enum):
    START = auto()
    """Before the opening brace."""
    KEY = auto()
    """Between the members of the object."""
    COLON = auto()
    VALUE = auto()
    """In the value of the member that `_key` names."""
    END = auto()
    """Behind the closing brace."""
    BROKEN = auto()
    """This is no call."""


class CallReader:
    """`push` takes text and keeps `name` and the arguments up to date; a call is known once it has a name.

    Arguments that are an object come out as they are written, piece by piece, so that what was taken, joined, is what the
    model wrote. Arguments in a JSON string, as some models write them, come out whole when the string ends.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._at = _At.START
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._arguments: list[str] = []
        self._had_arguments = False

    @property
    def is_broken(self) -> bool:
        """What came is no JSON object with a name."""
        return self._at is _At.BROKEN

    @property
    def is_complete(self) -> bool:
        return self._at is _At.END

    @property
    def in_string(self) -> bool:
        """Inside a JSON string, where a tag is only text."""
        return self._in_string

    def take(self) -> str:
        """Text of the arguments that has come since the last call of this; empty before the name is known."""
        if self.name is None:
            return ""
        if self._at is _At.END and not self._had_arguments:
            self._had_arguments = True
            return "{}"
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def push(self, letter: str) -> None:
        """The next character."""
        match self._at:
            case _At.VALUE:
                self._in_value(letter)
            case _At.START if letter == "{":
                self._at = _At.KEY
            case _At.KEY if self._in_string:
                self._in_key(letter)
            case _At.KEY if letter == '"':
                self._in_string, self._value = True, ['"']
            case _At.KEY if letter == "}":
                self._at = _At.END if self.name is not None else _At.BROKEN
            case _At.COLON if letter == ":":
                self._at, self._value, self._depth = _At.VALUE, [], 0
            case _At.KEY if letter == "," or letter in _BLANKS:
                pass
            case _At.END:
                pass
            case _:
                if letter not in _BLANKS:
                    self._at = _At.BROKEN

    def _in_key(self, letter: str) -> None:
        self._value.append(letter)
        self._follow_string(letter)
        if not self._in_string:
            self._key = self._text_of("".join(self._value))
            if not self.is_broken:
                self._at = _At.COLON

    def _in_value(self, letter: str) -> None:
        is_first = not self._value and letter not in _BLANKS
        if not self._value and not is_first:
            return
        if not is_first and not self._in_string and self._depth == 0 and letter in f",}}{_BLANKS}":
            self._end_value()
            if letter == "}":
                self.push(letter)
            return
        self._value.append(letter)
        if self._in_string:
            self._follow_string(letter)
        elif letter == '"':
            self._in_string = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
        is_streamed = self._key in _ARGUMENTS and self._value[0] == "{"
        if is_streamed:
            self._had_arguments = True
            self._arguments.append(letter)
        if not self._in_string and self._depth == 0 and self._value[0] in '"{[':
            self._end_value()

    def _end_value(self) -> None:
        written = "".join(self._value)
        self._at = _At.KEY
        if self._key in _NAMES:
            self.name = self._text_of(written) or None
            if self.name is None:
                self._at = _At.BROKEN
        elif self._key in _ARGUMENTS and written[0] != "{":
            self._had_arguments = True
            self._arguments.append(
                self._text_of(written) if written[0] == '"' else "{}" if written == "null" else written
            )

    def _follow_string(self, letter: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif letter == "\\":
            self._is_escaped = True
        elif letter == '"':
            self._in_string = False

    def _text_of(self, written: str) -> str:
        """What a JSON string says; a call that has something else there is none."""
        try:
            text = json.loads(written, strict=False)
        except ValueError:
            text = None
        if isinstance(text, str):
            return text
        self._at = _At.BROKEN
        return ""
