"""What workers keep beside a job for routers that have not sent it: who asked for what, and when. Bytes to them."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from array import array
from dataclasses import dataclass
from typing import Any

from router.api.naming import Naming

MAX_TICKET_BYTES = 256 << 10
"""As the wire takes them (workers/wire/attach_protobuf.py)."""
MAX_WRITTEN_BYTES = 32 << 20
_PLAIN_BYTES = 4 << 10
"""Up to here nothing is compressed: it would take longer than to send it."""


@dataclass(frozen=True, slots=True)
class Ticket:
    kind: str
    """Of answer: router/api/kinds.py."""
    owner: str
    naming: Naming
    digest: str
    """Of the body."""
    body: bytes
    """Empty: it was too long to be kept."""
    earlier: list[dict[str, Any]] | None = None
    """The conversation that the request goes on from, where its body only names it."""
    prompt: tuple[int, ...] = ()
    """The tokens of its prompt, where they are not those that everybody reads in the body: it went on from a remembered turn."""

    @property
    def owner_number(self) -> int:
        """Whose it is, as workers keep account of it."""
        return int.from_bytes(hashlib.sha256(self.owner.encode()).digest()[:8])

    def write(self) -> bytes:
        """Without the body where it would be too long; without a conversation that it only names nothing is of use."""
        written = self._write(self.body)
        return written if len(written) <= MAX_TICKET_BYTES else self._write(b"", is_short=True)

    def _write(self, body: bytes, is_short: bool = False) -> bytes:
        head = {
            "kind": self.kind,
            "owner": self.owner,
            "job": self.naming.job_id,
            "created": self.naming.created,
            "digest": self.digest,
            "earlier": None if is_short else self.earlier,
            "prompt": "" if is_short else base64.b64encode(array("i", self.prompt).tobytes()).decode(),
        }
        text = json.dumps(head).encode() + b"\n" + body
        return b"\0" + text if len(text) <= _PLAIN_BYTES else b"\1" + zlib.compress(text, 1)

    @classmethod
    def read(cls, written: bytes) -> Ticket | None:
        """None: it is none that this version writes."""
        try:
            text = written[1:]
            if written[:1] == b"\1":
                text = zlib.decompressobj().decompress(text, MAX_WRITTEN_BYTES)
            line, _, body = text.partition(b"\n")
            head = json.loads(line)
            naming = Naming(head["job"], head["created"])
            prompt = array("i")  # which tickets of the release before do not have
            prompt.frombytes(base64.b64decode(head.get("prompt", ""), validate=True))
            return cls(head["kind"], head["owner"], naming, head["digest"], body, head["earlier"], tuple(prompt))
        except (ValueError, KeyError, TypeError, zlib.error):
            return None
