"""Remembers the tokens of assistants' turns by their text, so that the next prompt of a conversation begins with the tokens that were
computed, and finds their KV.

Tokenizing a history again gives other tokens than those that were generated: "Assistant: " ends in a blank that stands alone as a
token before an answer, and belongs to the answer's first word afterwards. With what is remembered here a prompt is: the tokens of the
turn that it continues, as they were, and what the template puts behind that turn, tokenized as it always is. The text is the same.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workers.kv_cache.block_hash import PromptTokens
from workers.request import FinishReason, Output
from workers.shares import Shares
from workers.status import ModelInfo
from workers.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from router.api.translate import Job

MAX_TURNS = 16_384
_TRIED = 4
"""Of a conversation's last turns; those before are in what follows them."""


class Turns:
    """What one router remembers. Where it is too much, the oldest of the client that has most are forgotten. Used by several threads.
    Texts are kept as keyed hashes, under the key of the client that had them, and the salt of its request."""

    def __init__(self, tokenizer: Tokenizer, max_bytes: int) -> None:
        """`max_bytes` of tokens, 4 bytes each; 0: nothing is remembered."""
        self._tokenizer = tokenizer
        self.max_bytes = max_bytes
        self._secret = secrets.token_bytes(32)
        self._turns: dict[bytes, bytes] = {}
        self._counts: Shares[bytes, bytes] = Shares(MAX_TURNS)
        self._bytes: Shares[bytes, bytes] = Shares(max_bytes)
        self._lock = threading.Lock()

    def splice(self, job: Job, owner: bytes, info: ModelInfo) -> Job:
        """The job with the prompt of a conversation that goes on from a turn that is remembered, and with the note that its own turns
        are to be."""
        rendered = job.prompts[0].rendered
        if not rendered:
            return job
        secret = owner + hashlib.sha256(job.cache_salt.encode()).digest()
        job = replace(job, turn=Turn(self, owner, self._hash(secret, rendered)))
        prompt = job.prompts[0]
        for end in prompt.turn_ends[: -_TRIED - 1 : -1]:
            remembered = self._find(self._hash(secret, rendered[:end]).digest(), owner)
            if remembered is None:
                continue
            head = tuple(self._tokenizer.encode(rendered[:end], False))
            if prompt.token_ids[: len(head)] != head:
                continue  # what stands behind the turn is one token with its end
            token_ids = PromptTokens((*remembered, *prompt.token_ids[len(head) :]))
            if len(token_ids) + max(one.params.max_tokens for one in job.requests) > info.max_model_len:
                break
            return with_prompt(job, token_ids)
        return job

    def put(self, digest: bytes, owner: bytes, token_ids: bytes) -> None:
        if len(token_ids) > self.max_bytes:
            return
        with self._lock:
            self._turns[digest] = token_ids
            self._count(digest, owner)
            for surplus in {*self._counts.take_surplus(), *self._bytes.take_surplus()}:
                del self._turns[surplus]
                self._counts.remove(surplus)
                self._bytes.remove(surplus)

    def is_plain(self, output: array[int]) -> bool:
        """Whether the text of these tokens shows all of them."""
        return not self._tokenizer.special_ids.intersection(output)

    def without_end(self, output: array[int]) -> array[int]:
        return output[:-1] if output and output[-1] in self._tokenizer.eos_token_ids else output

    def _count(self, digest: bytes, owner: bytes) -> None:
        """The newest of its owner from now on."""
        self._counts.add(digest, owner)
        self._bytes.add(digest, owner, len(self._turns[digest]))

    def _find(self, digest: bytes, owner: bytes) -> array[int] | None:
        with self._lock:
            packed = self._turns.get(digest)
            if packed is None:
                return None
            self._count(digest, owner)
        found = array("i")
        found.frombytes(packed)
        return found

    def _hash(self, owner: bytes, text: str) -> hashlib.blake2b:
        return hashlib.blake2b(owner + text.encode(errors="surrogatepass"), key=self._secret, digest_size=24)


def with_prompt(job: Job, token_ids: tuple[int, ...]) -> Job:
    """A job of one prompt, which is these tokens."""
    requests = tuple(replace(one, prompt_token_ids=token_ids) for one in job.requests)
    return replace(job, prompts=(replace(job.prompts[0], token_ids=token_ids),), requests=requests)


@dataclass(frozen=True, slots=True)
class Turn:
    """Of a conversation whose next turn is generated: where it is to be remembered."""

    turns: Turns
    owner: bytes
    prompt_hash: hashlib.blake2b


class TurnRecorder:
    """Follows the outputs of one choice, and has its turn remembered when it ends whole."""

    def __init__(self, turn: Turn, prompt_token_ids: tuple[int, ...]) -> None:
        self._turns = turn.turns
        self._owner = turn.owner
        self._hash = turn.prompt_hash.copy()
        self._prompt = prompt_token_ids
        self._output = array("i")

    def add(self, output: Output) -> None:
        self._output.extend(output.token_ids)
        if output.text:
            self._hash.update(output.text.encode(errors="surrogatepass"))
        is_whole = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and output.stop_reason is None
        if is_whole:
            said = self._turns.without_end(self._output)
            if said and self._turns.is_plain(said):
                self._turns.put(self._hash.digest(), self._owner, (array("i", self._prompt) + said).tobytes())
