"""Splits the text of one choice into reasoning, answer and tool calls while it arrives; knows tags, not HTTP.

Every character is given out as soon as it is certain what it belongs to: what may be the beginning of a tag is held back, and
so are line breaks that a tag may follow. What is given out does not depend on how the text was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from router.api.formats.calls import CallReader
from router.api.formats.formats import OutputFormat


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The `index`-th call of the choice, counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More text of the arguments of a call that has started; joined, they are JSON if the call was finished."""

    index: int
    text: str


Part = Reasoning | Content | CallStarted | CallArguments


class _In(Enum):
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class OutputReader:
    """`push` text, then `finish`. `opens_reasoning`: the prompt ended inside reasoning."""

    def __init__(self, form: OutputFormat, opens_reasoning: bool, max_calls: int) -> None:
        """Calls beyond `max_calls` are left out."""
        self._form = form
        self._has_tags = form != OutputFormat()
        self._max_calls = max_calls
        self._in = _In.REASONING if opens_reasoning and form.reasoning else _In.CONTENT
        self._rest = ""
        """Text that is not understood yet."""
        self._parts: list[Part] = []
        self._breaks = ""
        """Line breaks that come out when text follows, and not when a tag does."""
        self._at_start = True
        """Of a stretch of text behind a tag, whose leading line breaks belong to the tag."""
        self._has_content = False
        self._has_answer = False
        """A tag has told the answer from what surrounds it."""
        self._call = CallReader()
        self._written = ""
        """Of a call without a name so far: what is shown as text should it be none."""
        self._is_started = False
        self.num_calls = 0

    @property
    def is_reasoning(self) -> bool:
        return self._in is _In.REASONING

    def push(self, text: str) -> list[Part]:
        self._rest += text
        while self._step(is_last=False):
            pass
        return self._taken()

    def finish(self) -> list[Part]:
        """What was held back, when the text has ended."""
        while self._step(is_last=True):
            pass
        if self._in is _In.CALL:
            self._end_call("")
        if self._in is _In.CONTENT and not self._has_answer:
            self._give(self._breaks)
        self._breaks = ""
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # ---- the text, piece by piece ----

    def _step(self, is_last: bool) -> bool:
        """Reads on as far as the next tag; False when more text is needed."""
        if not self._rest:
            return False
        if self._in is _In.CALL:
            return self._read_call(is_last)
        tags = self._tags()
        found = [(place, tag) for tag in tags if (place := self._rest.find(tag)) >= 0 and self._counts(tag, place)]
        if found:
            place, tag = min(found)
            self._text(self._rest[:place])
            self._rest = self._rest[place + len(tag) :]
            self._enter(tag)
            return True
        kept = 0 if is_last else _held(self._rest, tags)
        self._text(self._rest[: len(self._rest) - kept])
        self._rest = self._rest[len(self._rest) - kept :]
        return False

    def _tags(self) -> list[str]:
        form = self._form
        if self._in is _In.REASONING:
            return [form.reasoning[1]] if form.reasoning else []
        tags = list(form.answer or ())
        if form.reasoning and not self._has_content:
            tags += form.reasoning
        if form.call:
            tags.append(form.call[0])
        return tags

    def _counts(self, tag: str, place: int) -> bool:
        """Whether a tag that was found is one: reasoning comes before all content, or not at all."""
        is_late = self._in is _In.CONTENT and self._form.reasoning is not None and tag in self._form.reasoning
        return not is_late or not self._rest[:place].strip("\n")

    def _enter(self, tag: str) -> None:
        form = self._form
        breaks, self._breaks = self._breaks, ""
        self._at_start = True
        if form.call and tag == form.call[0]:
            self._in, self._call, self._written, self._is_started = _In.CALL, CallReader(), breaks + tag, False
        elif form.reasoning and tag == form.reasoning[0]:
            self._in = _In.REASONING
        else:
            self._in = _In.CONTENT
            self._has_answer |= form.answer is not None and tag in form.answer

    def _text(self, text: str) -> None:
        if not self._has_tags:
            self._give(text)
            return
        if self._at_start and self._strips_start():
            text = text.lstrip("\n")
        if not text:
            return
        self._at_start = False
        bare = text.rstrip("\n")
        if not bare:
            self._breaks += text
            return
        self._give(self._breaks + bare)
        self._breaks = text[len(bare) :]

    def _strips_start(self) -> bool:
        """Line breaks at the start of a text that no tag precedes are the model's own."""
        return self._form.reasoning is not None or self._form.answer is not None or self.num_calls > 0

    def _give(self, text: str) -> None:
        if not text:
            return
        if self._in is _In.REASONING:
            self._parts.append(Reasoning(text))
        else:
            self._has_content = True
            self._parts.append(Content(text))

    # ---- a call ----

    def _read_call(self, is_last: bool) -> bool:
        assert self._form.call
        end = self._form.call[1]
        for place, letter in enumerate(self._rest):
            if not self._call.in_string and letter == end[0]:
                if self._rest.startswith(end, place):
                    self._rest = self._rest[place + len(end) :]
                    self._end_call(end)
                    return True
                if not is_last and end.startswith(self._rest[place:]):
                    self._rest = self._rest[place:]
                    self._show_call()
                    return False
            self._call.push(letter)
            if self._is_started:
                continue
            self._written += letter
            if self._call.is_broken:
                self._rest = self._rest[place + 1 :]
                self._end_call("")
                return True
            if self._call.name is not None:
                self._start_call(self._call.name)
        self._rest = ""
        self._show_call()
        return False

    def _start_call(self, name: str) -> None:
        self._is_started, self._written = True, ""
        self.num_calls += 1
        if self.num_calls <= self._max_calls:
            self._parts.append(CallStarted(self.num_calls - 1, name))

    def _show_call(self) -> None:
        text = self._call.take()
        if text and self.num_calls <= self._max_calls:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def _end_call(self, end: str) -> None:
        """The call is over, or was none: then it is shown as the text that it is."""
        self._in, self._at_start = _In.CONTENT, self._is_started
        if self._is_started:
            self._show_call()
        else:
            self._text(self._written + end)
        self._written = ""


def _held(text: str, tags: list[str]) -> int:
    """How many characters at the end may be the beginning of a tag."""
    longest = max(map(len, tags), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0
