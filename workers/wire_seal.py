"""Numbers and checksums the messages of a stream, so that one that is lost, repeated or changed ends the stream and not the truth. Knows no message's meaning."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import xxhash
from google.protobuf.message import DecodeError

from workers.errors import StreamDamaged

M = TypeVar("M")


def _checksum(message: Any) -> int:
    """xxh3-64 of the message without its checksum, as protobuf writes it deterministically."""
    given, message.checksum = message.checksum, 0
    value = xxhash.xxh3_64_intdigest(message.SerializeToString(deterministic=True))
    message.checksum = given
    return value


class Sealer:
    """The writing end of a stream. `number` is that of the last message."""

    def __init__(self) -> None:
        self.number = 0

    def seal(self, message: M) -> M:
        """Gives a protobuf message (with the fields number and checksum) its number and checksum."""
        sealed: Any = message
        self.number += 1
        sealed.number = self.number
        sealed.checksum = _checksum(message)
        return message


class Unsealer:
    """The reading end. `number` is that of the last message. A stream that begins without seals has none: nothing is checked."""

    def __init__(self) -> None:
        self.number = 0
        self._is_sealed: bool | None = None

    def check(self, message: Any) -> None:
        """Raises StreamDamaged. None stands for a message that could not be parsed."""
        if message is None:
            raise StreamDamaged(f"message {self.number + 1} of a stream cannot be read")
        if self._is_sealed is None:
            self._is_sealed = bool(message.number or message.checksum)
        if not self._is_sealed:
            return
        if message.checksum != _checksum(message):
            raise StreamDamaged(f"message {self.number + 1} of a stream does not match its checksum")
        if message.number != self.number + 1:
            raise StreamDamaged(f"message {message.number} of a stream came after message {self.number}")
        self.number = message.number


async def verified(messages: AsyncIterator[M], unsealer: Unsealer | None = None) -> AsyncIterator[M]:
    """The messages of a stream; raises StreamDamaged at the first that is not what was written."""
    unsealer = unsealer or Unsealer()
    try:
        async for message in messages:
            unsealer.check(message)
            yield message
    except DecodeError as error:
        raise StreamDamaged(f"message {unsealer.number + 1} of a stream cannot be read") from error
