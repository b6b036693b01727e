"""Keeps the words of a conversation from being read as control tokens: who writes `<|end_of_sentence|>` gets its letters, not the token.

The rendered conversation is read by a second tokenizer that knows the control tokens by private names only. Those that the
template wrote are given these names; those that stand in a message are passed through the template behind marks, and are text.
Templates see messages without control tokens as they are.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from workers.errors import InvariantViolated

_LEFT_ALONE = ("<think>", "</think>")
"""Some vocabularies have them as control tokens. Templates look for them in earlier answers, and they end no turn."""
_BITE = 1 << 16
"""Characters that are searched at once."""


class ControlText:
    """The control tokens of one tokenizer, as text. Immutable, safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        special = {token.content: token_id for token_id, token in added.items() if token.special and token.content}
        special = {name: token_id for name, token_id in special.items() if name not in _LEFT_ALONE}
        self._names = sorted(special, key=len, reverse=True)
        self._openings = {name[:2] for name in self._names}
        self._firsts = {name[:1] for name in self._names}
        self._beginnings = {name[:length] for name in self._names for length in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)
        nonce = secrets.token_hex(8)  # nobody can write these by chance or on purpose
        self._private = {name: f"\ue000{nonce}:{special[name]}\ue001" for name in self._names}
        self._marks = {name: f"\ue002{nonce}:{special[name]}\ue003" for name in self._names}
        self._cut = f"\ue004{nonce}\ue005"
        self._backend = _renamed(backend, self._private)
        if any(self._backend.token_to_id(self._private[name]) != token_id for name, token_id in special.items()):
            raise InvariantViolated("the control tokens of this tokenizer cannot be renamed")

    def is_in(self, value: Any) -> bool:
        """Whether a message's text, however deep, holds a control token, or the beginning of one at its end."""
        return any(self._may_hold(text) and self.marked(text) != text for text in _texts(value))

    def marked(self, value: Any) -> Any:
        """The same with marks in the place of control tokens."""
        if isinstance(value, str):
            return self._mark(value) if self._may_hold(value) else value
        if isinstance(value, Mapping):
            return {key: self.marked(inner) for key, inner in value.items()}
        return [self.marked(inner) for inner in value] if isinstance(value, list) else value

    def encode(self, rendered: str, add_special_tokens: bool = False) -> list[int]:
        """The tokens of a conversation that was rendered from marked messages."""
        for name in self._names:
            if name in rendered:
                rendered = rendered.replace(name, self._private[name])
        rendered = rendered.replace(self._cut, "")
        for name, mark in self._marks.items():
            if mark in rendered:
                rendered = rendered.replace(mark, name)
        ids: list[int] = self._backend.encode_batch_fast([rendered], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _may_hold(self, text: str) -> bool:
        """Looks at a bite at a time: a search lets no other thread run."""
        if text[-1:] in self._beginnings:
            return True
        for start in range(0, len(text), _BITE):
            bite = text[start : start + _BITE + 1]
            if any(first in bite for first in self._firsts) and any(opening in bite for opening in self._openings):
                return True
        return False

    def _mark(self, text: str) -> str:
        for name in self._names:
            if name in text:
                text = text.replace(name, self._marks[name])
        ends_in_a_beginning = any(text[-length:] in self._beginnings for length in range(1, self._longest))
        return text + self._cut if ends_in_a_beginning else text


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _renamed(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """A copy that calls some of its added tokens otherwise."""
    written = json.loads(backend.to_str())
    for token in written["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = written["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for processor in _template_processors(written["post_processor"]):
        for token in processor["special_tokens"].values():
            token["tokens"] = [names.get(name, name) for name in token["tokens"]]
    renamed: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps(written))
    renamed.no_truncation()
    renamed.no_padding()
    return renamed


def _template_processors(processor: Any) -> Iterable[Any]:
    match processor:
        case {"type": "TemplateProcessing"}:
            yield processor
        case {"type": "Sequence", "processors": list(inner)}:
            for each in inner:
                yield from _template_processors(each)
