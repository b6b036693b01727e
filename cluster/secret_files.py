"""Makes a secret in a file that only this user can read, and reads one from there; knows nothing of what it opens."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Collection

from workers.errors import InvalidConfig

MAX_BYTES = 4096


def make_secret(path: str) -> None:
    """Writes a new one, 64 characters, into a new file. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def read_secret(path: str, setting: str, min_bytes: int = 1) -> str:
    """The text of the file without white space around it. Raises InvalidConfig, which names `setting` and never the text."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidConfig(f"{setting} {path!r} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidConfig(f"{setting} {path!r} is no file")
        if not is_private(status, os.geteuid(), (os.getegid(), *os.getgroups())):
            raise InvalidConfig(f"{setting} {path!r} can be read by other users; chmod 600 it, and make a new secret")
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise InvalidConfig(f"{setting} {path!r} is too long for a secret: at most {MAX_BYTES} bytes")
    try:
        secret = text.decode().strip()
    except UnicodeDecodeError:
        raise InvalidConfig(f"{setting} {path!r} must be text in UTF-8") from None
    if len(secret) < min_bytes:
        raise InvalidConfig(f"{setting} {path!r} must hold at least {min_bytes} characters")
    return secret


def is_private(status: os.stat_result, user: int, groups: Collection[int]) -> bool:
    """Only this user, of these groups, can read a file. Of root's files a group of another user may read one too: Kubernetes
    mounts Secrets so for processes that are not root.
    """
    if status.st_uid == 0 != user and status.st_gid in groups:
        return not status.st_mode & 0o037
    return not status.st_mode & 0o077 and status.st_uid in (0, user)
