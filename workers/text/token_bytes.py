"""Reads a tokenizer's definition: what bytes each token stands for, and how many characters of a text at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workers.errors import InvalidConfig


def byte_rule(decoder: Mapping[str, Any]) -> tuple[Callable[[str], bytes], int]:
    """How a token's name becomes bytes, and how many blanks the decoder takes from the start of a text."""
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = False
    num_stripped = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(blank)}:
                replacements.append((blank, " "))
                num_stripped = 0 if step.get("prepend_scheme") == "never" else 1
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                num_stripped = start
            case _:
                raise InvalidConfig(f"the tokenizer's decoder {json.dumps(step)[:80]} is not one that Baton knows")
    alphabet = _byte_level_alphabet()

    def to_bytes(token: str) -> bytes:
        if byte_level:
            known = all(letter in alphabet for letter in token)
            return bytes(alphabet[letter] for letter in token) if known else token.encode()
        for old, new in replacements:
            token = token.replace(old, new)
        if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.encode()

    return to_bytes, num_stripped


def longest_token(definition: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int:
    """The most characters of a text that one token can stand for; 0 where that has no bound that could be proved.

    It has one where every character gets into the tokens: no step drops or shortens any, and what the vocabulary does not
    know is spelled in bytes. A token of bytes stands for at most as many characters.
    """
    model, added = definition["model"], definition["added_tokens"]
    normalizers = _steps(definition["normalizer"], "normalizers")
    splitters = _steps(definition["pre_tokenizer"], "pretokenizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in splitters)
    letters = _byte_level_alphabet() if is_byte_level else {f"<0x{byte:02X}>": byte for byte in range(256)}
    keeps_all = (
        model["type"] == "BPE"
        and (is_byte_level or model.get("byte_fallback") is True)
        and all(letter in vocabulary for letter in letters)
        and all(_keeps_length(step) for step in normalizers)
        and all(_keeps_all(step) for step in splitters)
        and not any(token["lstrip"] or token["rstrip"] for token in added)
    )
    return max(map(len, vocabulary), default=0) if keeps_all else 0


def _steps(step: Mapping[str, Any] | None, name: str) -> Sequence[Mapping[str, Any]]:
    if step is None:
        return ()
    return step[name] if step["type"] == "Sequence" else (step,)


def _keeps_length(normalizer: Mapping[str, Any]) -> bool:
    match normalizer:
        case {"type": "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return len(new) >= len(old)
        case _:
            return False


def _keeps_all(splitter: Mapping[str, Any]) -> bool:
    match splitter:
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return behavior != "Removed"
        case {"type": kind}:
            return kind in ("ByteLevel", "Metaspace", "Digits")
        case _:
            return False


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE names the printable Latin-1 bytes by themselves and the others, in order, from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
