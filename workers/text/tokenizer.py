"""Turns text and conversations into token ids and back; it knows nothing of requests, engines or HTTP.

Decoding goes through one table, token id -> bytes: the text of a token sequence is the UTF-8 reading of its bytes,
joined. That makes incremental decoding exact and O(1) per token for byte-level and for byte-fallback vocabularies.
"""

from __future__ import annotations

import codecs
import copy
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from workers.errors import InvalidConfig, InvalidRequest
from workers.model.checkpoint.ernie_config import MAX_VOCABULARY
from workers.text.control_text import ControlText
from workers.text.template_sandbox import TemplateSandbox, TooCostly
from workers.text.token_bytes import byte_rule, longest_token
from workers.text.tokenizer_files import (
    needs_packages,
    read_backend,
    read_eos_ids,
    read_json,
    read_special_tokens,
    read_templates,
)


class Tokenizer:
    """The vocabulary and chat template of one checkpoint. Immutable after `load`, safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        eos_token_ids: frozenset[int],
    ) -> None:
        """`special_tokens` are the names templates may use, such as bos_token. Raises InvalidConfig for an unknown decoder."""
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._sources = dict(chat_templates)
        self._sandbox = TemplateSandbox()
        try:
            self._templates = {name: self._sandbox.from_string(source) for name, source in chat_templates.items()}
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, OverflowError) as error:
            reason = str(error) or "it is nested too deeply"
            raise InvalidConfig(f"the chat template does not parse: {reason}") from error
        for template in self._templates.values():
            self._try(template)
        self.eos_token_ids = eos_token_ids
        to_bytes, self._num_stripped = byte_rule(json.loads(backend.decoder.__getstate__()) if backend.decoder else {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > MAX_VOCABULARY:
            raise InvalidConfig(
                f"the tokenizer names token id {self.vocab_size - 1}; the highest is {MAX_VOCABULARY - 1}"
            )
        self._bytes = [b""] * self.vocab_size
        for token, token_id in vocabulary.items():
            self._bytes[token_id] = to_bytes(token)
        added = backend.get_added_tokens_decoder()
        self.added_token_ids = frozenset(added)
        self._added_tokens = {token.content: token_id for token_id, token in added.items()}
        """Control tokens and others that no text is cut into."""
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._longest_token = longest_token(json.loads(backend.to_str()), vocabulary)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a checkpoint folder. Raises InvalidConfig with one sentence when it has no usable tokenizer."""
        folder = Path(path)
        backend = read_backend(folder)
        # Training scripts leave these in the file; transformers sets both anew for every call, and so nobody notices.
        backend.no_truncation()
        backend.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        special_tokens = read_special_tokens(read_json(folder / "special_tokens_map.json") | config)
        templates = read_templates(folder, config)
        try:
            return cls(backend, templates, special_tokens, read_eos_ids(folder, backend, special_tokens))
        except InvalidConfig as error:
            raise InvalidConfig(f"{folder}: {error}") from error

    @classmethod
    def check(cls, path: str | Path) -> None:
        """Raises InvalidConfig as `load` would, but converts no SentencePiece model, which takes long: it looks for what that needs."""
        folder = Path(path)
        if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
            cls.load(folder)
            return
        missing = [name for name in ("transformers", "sentencepiece") if importlib.util.find_spec(name) is None]
        if missing:
            raise InvalidConfig(needs_packages(folder, f"missing: {' and '.join(missing)}"))
        read_templates(folder, read_json(folder / "tokenizer_config.json"))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Lets other threads run meanwhile: only the library's calls for several texts release the interpreter's lock."""
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `encode` surely does not stay below, found without a look at the text; 0 where nothing is sure."""
        return -(-len(text) // self._longest_token) if self._longest_token else 0

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of the tokens; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        text = b"".join(self._visible(token_ids, skip_special_tokens)).decode("utf-8", "replace")
        return _strip_start(text, self._num_stripped)

    def token_bytes(self, token_id: int) -> bytes:
        """What this token adds to a text; empty for ids outside the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        r"""A printable name of one token: its text, or `bytes:\xe4\xbd` when its bytes are no whole characters."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @cached_property
    def control(self) -> ControlText:
        """Made when it is first asked for, which takes as long as loading a vocabulary."""
        return ControlText(self._backend)

    def _try(self, template: jinja2.Template) -> None:
        """Raises InvalidConfig when one short question takes more than a rendering's share; other refusals may be the question's."""
        names = {**self._special_tokens, "messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True}
        try:
            self._sandbox.render(template, names)
        except (TooCostly, RecursionError, MemoryError) as error:
            reason = str(error) if isinstance(error, TooCostly) else type(error).__name__
            raise InvalidConfig(f"the chat template does more for a short question than it may: {reason}") from error
        except Exception:
            return

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def chat_template(self, with_tools: bool) -> str:
        """The source of the template that a conversation is rendered by; empty without one."""
        return (self._sources.get("tool_use") if with_tools else None) or self._sources.get("default", "")

    def hides(self, texts: Iterable[str]) -> bool:
        """Whether one of these texts is a special token, which decoding may leave out."""
        ids = (self._backend.token_to_id(text) for text in texts)
        return any(token_id in self._special_ids for token_id in ids if token_id is not None)

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token ..., as templates know them."""
        return self._special_tokens

    @property
    def special_ids(self) -> frozenset[int]:
        """Of tokens that are left out of texts."""
        return self._special_ids

    @property
    def added_tokens(self) -> dict[str, int]:
        """Control tokens and others that no text is cut into, by their texts."""
        return self._added_tokens

    def token_id(self, text: str) -> int | None:
        """The token that stands for exactly this text; None where there is none."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id

    def with_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template. Raises InvalidRequest when that does not parse."""
        try:
            template = self._sandbox.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"chat_template does not parse: {error!s:.200}", "chat_template") from error
        other = copy.copy(self)
        other._sources, other._templates = {"default": source}, {"default": template}
        return other

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **chat_template_kwargs: Any,
    ) -> str:
        """The conversation as the model was trained to read it, every special token written out. Raises InvalidRequest when the template refuses it."""
        template = self._templates.get("tool_use" if tools else "default") or self._templates.get("default")
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        names: dict[str, Any] = {**self._special_tokens, **chat_template_kwargs}
        names.update(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        try:
            return self._sandbox.render(template, names)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise InvalidRequest(f"the chat template cannot render these messages: {error}", "messages") from error

    def _visible(self, token_ids: Iterable[int], skip_special_tokens: bool) -> Iterable[bytes]:
        hidden = self._special_ids if skip_special_tokens else frozenset()
        return (self.token_bytes(token_id) for token_id in token_ids if token_id not in hidden)


class IncrementalDetokenizer:
    """Text of a growing token sequence, released as soon as no later token can change it.

    What `push` and `flush` return, joined, equals `Tokenizer.decode` of all pushed tokens. `prompt_token_ids_tail`
    (the last few tokens before the first pushed one; four suffice) completes a character that the prompt cut in two.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids_tail: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_stripped = 0 if prompt_token_ids_tail else tokenizer._num_stripped
        for token_id in prompt_token_ids_tail:
            self._decoder.decode(tokenizer.token_bytes(token_id))

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a UTF-8 character is unfinished."""
        if self._skip_special_tokens and token_id in self._tokenizer._special_ids:
            return ""
        return self._certain(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is still held back: U+FFFD for an unfinished character."""
        return self._certain(self._decoder.decode(b"", final=True))

    def _certain(self, text: str) -> str:
        if not self._num_stripped or not text:
            return text
        stripped = _strip_start(text, self._num_stripped)
        self._num_stripped = 0 if stripped else self._num_stripped - len(text)
        return stripped


def _strip_start(text: str, count: int) -> str:
    while count and text.startswith(" "):
        text, count = text[1:], count - 1
    return text
