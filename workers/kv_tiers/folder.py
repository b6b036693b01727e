"""A folder with one file a KV block: writes, reads, verifies, deletes. Knows no order of use and no queue."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from workers.errors import BatonError, InvalidConfig
from workers.kv_cache.block_hash import BlockKey, block_hashes

MAGIC = b"BATONKVB"
VERSION = 1
_FIXED = struct.Struct("<8sII16sQQIQQ")
"""Magic, version, header bytes, fingerprint, block hash, parent hash, number of tokens, payload bytes, payload checksum. Then the token
ids (int32 each) and xxh3_64 of everything before it. All little endian."""


class BadRecord(BatonError):
    """A file that is not what its name says: corrupt, truncated, or of another model."""


@dataclass(frozen=True, slots=True)
class Format:
    """What every file of one worker has in common. `fingerprint` is 16 bytes."""

    fingerprint: bytes
    block_size: int
    block_bytes: int

    @property
    def header_bytes(self) -> int:
        return _FIXED.size + 4 * self.block_size + 8

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + self.block_bytes


def fingerprint_bytes(model_fingerprint: str) -> bytes:
    return xxhash.xxh3_128_digest(model_fingerprint.encode())


def checksum(payload: npt.NDArray[np.uint8]) -> int:
    """xxh3_64 of a block's bytes, contiguous uint8."""
    return xxhash.xxh3_64_intdigest(payload.data)


def encode_header(form: Format, key: BlockKey, payload_checksum: int) -> bytes:
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        form.header_bytes,
        form.fingerprint,
        key.block_hash,
        key.parent,
        key.num_tokens,
        form.block_bytes,
        payload_checksum,
    )
    body = fixed + key.tokens
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def decode_header(form: Format, raw: bytes) -> tuple[BlockKey, int]:
    """The block's key and the checksum of its bytes. Raises BadRecord unless all of it is right for this model."""
    if len(raw) != form.header_bytes:
        raise BadRecord(f"the header has {len(raw)} bytes, not {form.header_bytes}")
    magic, version, header_bytes, fingerprint, block_hash, parent, num_tokens, payload_bytes, payload_checksum = (
        _FIXED.unpack_from(raw)
    )
    if (magic, version, header_bytes) != (MAGIC, VERSION, form.header_bytes):
        raise BadRecord("the file is no KV block of this version")
    if xxhash.xxh3_64_intdigest(raw[:-8]) != int.from_bytes(raw[-8:], "little"):
        raise BadRecord("the header does not match its checksum")
    if fingerprint != form.fingerprint or (num_tokens, payload_bytes) != (form.block_size, form.block_bytes):
        raise BadRecord("the block belongs to another model")
    key = BlockKey(block_hash, parent, raw[_FIXED.size : _FIXED.size + 4 * num_tokens])
    if block_hashes(key.token_ids, form.block_size, parent) != [block_hash]:
        raise BadRecord("the block's hash is not that of its tokens")
    return key, payload_checksum


log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}\.(kv|tmp)")
_HOME = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"[0-9a-f]{2}")
"""Only files with such names, in folders with such names, are ever touched: a folder named by mistake loses nothing."""
_SCAN_FILES = 1024
"""Looked at, deleted or told of in one step of a scan."""
_LAST_NS = 2**63 - 1
"""The latest time of a file that is told from later ones, as a wrong clock may leave them."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """Blocks that are here, by their hashes, and how many files were refused and deleted."""

    hashes: tuple[int, ...]
    num_refused: int = 0


class BlockFolder:
    """FINGERPRINT/ab/ab....kv: for each model 256 subfolders, by the first byte of the hash.

    Locked for as long as it is open: two workers never share one.

    Files are not synced: what a power failure leaves half written does not match its checksum.
    """

    def __init__(self, path: Path, form: Format) -> None:
        """Raises InvalidConfig when the folder cannot be used, or another process uses it."""
        self._path = path
        self._home = path / form.fingerprint.hex()
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

    def scan(self) -> Iterator[Scanned | None]:
        """What an earlier process left, least recently used first, some blocks at a time; then deletes what other models left.

        Each step of it takes little time, also over millions of files: nothing is read but names, sizes and times. None: go on.
        The bytes, and whose they are, are verified when they are read.
        """
        hashes: list[int] = []
        times: list[int] = []
        num_refused = 0
        for folder in _subfolders(self._home):
            for count, entry in enumerate(_files(folder)):
                if count % _SCAN_FILES == _SCAN_FILES - 1:
                    yield None
                try:
                    state = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if entry.name.endswith(".kv") and state.st_size == self._form.file_bytes:
                    hashes.append(int(entry.name[:16], 16))
                    times.append(min(state.st_mtime_ns, _LAST_NS))
                else:
                    num_refused += 1
                    log.warning("deleted %s: it has not the size of a block", entry.path)
                    _delete(entry.path)
            yield None
        order = np.argsort(np.array(times, np.int64), kind="stable")
        in_order = np.array(hashes, np.uint64)[order]
        for first in range(0, len(in_order), _SCAN_FILES):
            yield Scanned(tuple(in_order[first : first + _SCAN_FILES].tolist()))
        for home in _subfolders(self._path):
            if home.name != self._home.name and _HOME.fullmatch(home.name):
                for folder in _subfolders(home):
                    for entry in _files(folder):
                        _delete(entry.path)
                        num_refused += 1
                        if num_refused % _SCAN_FILES == 0:
                            yield None
                    _remove(folder)
                _remove(home)
        if num_refused:
            yield Scanned((), num_refused)

    def write(self, key: BlockKey, payload: npt.NDArray[np.uint8], payload_checksum: int) -> None:
        """Raises OSError, and leaves no file, when the disk does not take it."""
        unfinished = self._file(key.block_hash, "tmp")
        try:
            unfinished.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        with open(self._file(key.block_hash), "rb", buffering=0, opener=_open_file) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadRecord("it is no regular file")
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
        name = f"{block_hash:016x}"
        return self._home / name[:2] / f"{name}.{kind}"


def _subfolders(path: Path) -> list[Path]:
    """Of those that may hold blocks, in no order; none where there is no such folder."""
    try:
        found = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder for folder in found if _PART.fullmatch(folder.name) or _HOME.fullmatch(folder.name)]


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError):
        yield from (entry for entry in os.scandir(folder) if _NAME.fullmatch(entry.name))


def _delete(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _remove(folder: Path) -> None:
    """Unless something else is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _open_file(path: str, flags: int) -> int:
    """Waits for nobody who might write to a pipe, and follows no link."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)


def _open_private(path: str, flags: int) -> int:
    """The files hold prompts: nobody else needs to read them."""
    return os.open(path, flags, 0o600)
