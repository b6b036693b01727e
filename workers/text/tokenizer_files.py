"""Reads what a checkpoint folder has of a tokenizer: vocabulary, chat templates, named tokens, and those that end a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from workers.checkpoint_files import (
    MAX_INDEX_BYTES,
    MAX_TEMPLATE_BYTES,
    MAX_TOKENIZER_BYTES,
    read_bytes,
    read_object,
    read_text,
)
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import eos_ids


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """From tokenizer.json, else from a SentencePiece model. Raises InvalidConfig."""
    if (folder / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_buffer(read_bytes(folder / "tokenizer.json", MAX_TOKENIZER_BYTES))
        except (InvalidConfig, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and when it panics not even that
            raise InvalidConfig(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    if not (folder / "tokenizer.model").exists():
        raise InvalidConfig(f"{folder} has neither tokenizer.json nor tokenizer.model")
    try:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return tokenizers.Tokenizer.from_str(converted.backend_tokenizer.to_str())
    except Exception as error:  # a missing package, or whatever the converter makes of the file
        raise InvalidConfig(needs_packages(folder, type(error).__name__)) from error


def needs_packages(folder: Path, why: str) -> str:
    """What an operator is told who has a SentencePiece model alone."""
    return (
        f"{folder} has only a SentencePiece tokenizer.model, which needs the packages transformers and sentencepiece "
        f"to convert ({why}); install them or put a tokenizer.json beside it"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises InvalidConfig."""
    return read_object(path, MAX_INDEX_BYTES) if path.exists() else {}


def read_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ...: plain strings, or objects with `content`."""
    named = ((name, value.get("content") if isinstance(value, dict) else value) for name, value in config.items())
    return {name: value for name, value in named if name.endswith("_token") and isinstance(value, str)}


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja wins over tokenizer_config.json, where it is one template or a list of named ones."""
    if (folder / "chat_template.jinja").exists():
        return {"default": read_text(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)}
    match config.get("chat_template"):
        case str(source):
            return {"default": source}
        case list(named):
            try:
                return {entry["name"]: entry["template"] for entry in named}
            except (KeyError, TypeError) as error:
                raise InvalidConfig(
                    f"{folder / 'tokenizer_config.json'} has a chat_template list that is not one of names and templates"
                ) from error
        case _:
            return {}


def read_eos_ids(folder: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> frozenset[int]:
    """What ends a generation: generation_config.json decides, else config.json, else the tokenizer's eos_token."""
    for name in ("generation_config.json", "config.json"):
        if ids := eos_ids(read_json(folder / name).get("eos_token_id"), folder / name):
            return frozenset(ids)
    named = backend.token_to_id(special_tokens.get("eos_token", ""))
    return frozenset() if named is None else frozenset((named,))
