"""Numbers the messages of a stream, so that one that is lost, repeated or overtaken ends the stream and not the truth. Knows no message's meaning.

There is no checksum beside the number: the bytes are TCP's to keep, and TLS's where it is used, and one over the parsed
message would not survive a field that the reader does not know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from workers.errors import StreamDamaged

M = TypeVar("M")


class Sealer:
    """The writing end of a stream. `number` is that of the last message."""

    def __init__(self) -> None:
        self.number = 0

    def seal(self, message: M) -> M:
        """Gives a protobuf message (with the field number) its number."""
        sealed: Any = message
        self.number += 1
        sealed.number = self.number
        return message


class Unsealer:
    """The reading end. `number` is that of the last message."""

    def __init__(self) -> None:
        self.number = 0

    def check(self, message: Any) -> None:
        """Raises StreamDamaged. None stands for a message that could not be parsed."""
        if message is None:
            raise StreamDamaged(f"message {self.number + 1} of a stream cannot be read")
        if message.number != self.number + 1:
            raise StreamDamaged(f"message {message.number} of a stream came after message {self.number}")
        self.number = message.number


async def verified(messages: AsyncIterator[M], unsealer: Unsealer | None = None) -> AsyncIterator[M]:
    """The messages of a stream; raises StreamDamaged at the first that is not the next one that was written."""
    unsealer = unsealer or Unsealer()
    try:
        async for message in messages:
            unsealer.check(message)
            yield message
    except DecodeError as error:
        raise StreamDamaged(f"message {unsealer.number + 1} of a stream cannot be read") from error
