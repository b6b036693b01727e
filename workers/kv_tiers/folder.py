"""A folder with one file a KV block: writes, reads, verifies, deletes. Knows no order of use and no queue."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workers.errors import InvalidConfig
from workers.kv_cache.block_hash import BlockKey
from workers.kv_tiers.record import BadRecord, Format, checksum, decode_header, encode_header

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}\.(kv|tmp)")
"""Only files with such names are ever touched: a folder named by mistake loses nothing."""


class BlockFolder:
    """Locked for as long as it is open: two workers never share one.

    Files are not synced: what a power failure leaves half written does not match its checksum.
    """

    def __init__(self, path: Path, form: Format) -> None:
        """Raises InvalidConfig when the folder cannot be used, or another process uses it."""
        self._path = path
        self._form = form
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidConfig(f"worker.kv_disk_folder: {path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InvalidConfig(
                f"worker.kv_disk_folder: {path} is in use by another worker; give each its own folder or name"
            ) from error

    def scan(self) -> tuple[list[tuple[int, int]], int]:
        """Hash and parent of the blocks that are here, least recently used first, and how many files were refused and deleted.

        Headers are verified now, the bytes when they are read.
        """
        found: list[tuple[int, int, int]] = []
        num_refused = 0
        for entry in os.scandir(self._path):
            if not _NAME.fullmatch(entry.name):
                continue
            try:
                key = self._identify(Path(entry.path))
                found.append((entry.stat().st_mtime_ns, key.block_hash, key.parent))
            except (BadRecord, OSError) as error:
                num_refused += 1
                log.warning("deleted %s: %s", entry.path, error)
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
        return [(block_hash, parent) for _, block_hash, parent in sorted(found)], num_refused

    def write(self, key: BlockKey, payload: npt.NDArray[np.uint8], payload_checksum: int) -> None:
        """Raises OSError, and leaves no file, when the disk does not take it."""
        unfinished = self._file(key.block_hash, "tmp")
        try:
            with open(unfinished, "wb", buffering=0, opener=_open_private) as file:
                for part in (encode_header(self._form, key, payload_checksum), payload.data):
                    rest = memoryview(part)
                    while len(rest):
                        rest = rest[file.write(rest) :]
            unfinished.rename(self._file(key.block_hash))
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise

    def read(self, key: BlockKey) -> npt.NDArray[np.uint8]:
        """The block's bytes, verified. Raises BadRecord or OSError; counts as a use of the file."""
        payload = np.empty(self._form.block_bytes, np.uint8)
        with self._file(key.block_hash).open("rb", buffering=0) as file:
            header = file.read(self._form.header_bytes)
            found, expected = decode_header(self._form, header)
            if found != key:
                raise BadRecord("the file holds another block than its name says")
            rest = memoryview(payload.data)
            while len(rest):
                count = file.readinto(rest)
                if not count:
                    raise BadRecord("the file is cut off")
                rest = rest[count:]
            if file.read(1):
                raise BadRecord("the file is too long")
            if checksum(payload) != expected:
                raise BadRecord("the bytes do not match their checksum")
            with contextlib.suppress(OSError):
                os.utime(file.fileno())
        return payload

    def delete(self, block_hash: int) -> None:
        with contextlib.suppress(OSError):
            self._file(block_hash).unlink()

    def close(self) -> None:
        """Lets another worker use the folder. The files stay."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _file(self, block_hash: int, kind: str = "kv") -> Path:
        return self._path / f"{block_hash:016x}.{kind}"

    def _identify(self, path: Path) -> BlockKey:
        if path.suffix == ".tmp" or path.stat().st_size != self._form.file_bytes:
            raise BadRecord("the file has not the size of a block")
        with path.open("rb", buffering=0) as file:
            key, _ = decode_header(self._form, file.read(self._form.header_bytes))
        if path.name != f"{key.block_hash:016x}.kv":
            raise BadRecord("the file holds another block than its name says")
        return key


def _open_private(path: str, flags: int) -> int:
    """The files hold prompts: nobody else needs to read them."""
    return os.open(path, flags, 0o600)
