"""Reads the files of a checkpoint folder, which a stranger may have made: regular ones that stand in it, of a size looked at first."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from workers.errors import InvalidConfig

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 128 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20


def check_file(path: Path) -> int:
    """The size of the file in bytes. Raises FileNotFoundError, and InvalidConfig for what is no file or stands elsewhere."""
    descriptor = _open(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """All of the file. Raises FileNotFoundError, and InvalidConfig for a longer one, as `check_file` does, and for what the disk says."""
    with os.fdopen(_open(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise InvalidConfig(f"{path} has {size} bytes; at most {max_bytes} are read of such a file")
        try:
            return file.read(max_bytes)
        except OSError as error:
            raise InvalidConfig(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: Path, max_bytes: int) -> str:
    """The file's text, in UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path} is not UTF-8: {error}") from error


def read_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in the file. Raises FileNotFoundError, InvalidConfig."""
    text = read_text(path, max_bytes)
    try:
        document = json.loads(text)
    except RecursionError:
        raise InvalidConfig(f"{path} is nested too deeply to be read as JSON") from None
    except ValueError as error:
        raise InvalidConfig(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidConfig(f"{path} must hold a JSON object")
    return document


def _open(path: Path) -> int:
    """Without waiting for whoever might write to a pipe."""
    try:
        place = path.resolve(strict=True)
        if not _is_in_folder(place, path.parent.resolve()):
            raise InvalidConfig(
                f"{path} is a link to {place}, outside the checkpoint folder: put the file itself there"
            )
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InvalidConfig(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidConfig(f"{path} is no regular file")
    return descriptor


def _is_in_folder(place: Path, folder: Path) -> bool:
    """The cache of huggingface_hub keeps the files of a snapshot in blobs/, two folders above, and links to them."""
    return place.is_relative_to(folder) or (
        folder.parent.name == "snapshots" and place.parent == folder.parent.parent / "blobs"
    )
