"""What is in each block of a simulated KV pool, as a number: a function of the tokens that the block stands for and of all before them. Knows no engine.

Real KV is such a function too, so a block that holds another prompt's KV, or nothing yet, is found out by whoever reads it.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.sim.product import BLOCK_SIZE, PromptTokens, Sequence, SequenceSlice
from cluster.sim.tokens import output_run

_MASK = (1 << 64) - 1
_BY_BLOCK = 0x9E3779B97F4A7C15
_BY_TOKEN = 0xC2B2AE3D27D4EB4F
SPOILT = 0
"""What is computed from KV that is not the sequence's own. No content has this number."""
FEW = 256
"""From so many sequences on, those that have ended are looked for."""


class KvContent:
    """Of one pool; each of `num_layers` layers has its number, since layers may travel by themselves. `sequence_of` finds what lives."""

    def __init__(self, num_blocks: int, num_layers: int) -> None:
        self.layers = [[SPOILT] * num_blocks for _ in range(num_layers)]
        self.sequence_of: Callable[[int], Sequence | None] = lambda sequence_id: None
        self._numbers: dict[int, list[int]] = {}
        """By sequence, of each of its blocks when it is full."""
        self._read: set[int] = set()
        """Sequences whose blocks have been looked at since they last changed other than by decoding."""
        self._room = FEW

    def holds(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the sequence's blocks hold the KV of its first `num_tokens` tokens, all of it."""
        num_full, rest = divmod(num_tokens, BLOCK_SIZE)
        numbers, blocks = self._numbers_of(sequence), sequence.table.blocks
        wanted = numbers[:num_full]
        if rest:
            wanted.append(_partly(numbers[num_full], rest))
        return all([layer[block] for block in blocks[: len(wanted)]] == wanted for layer in self.layers)

    def prefilled(self, piece: SequenceSlice) -> bool:
        """A chunk of a prompt is computed from what is before it. False: that is not the sequence's own."""
        sequence, start = self._sequence(piece), piece.start
        is_own = not start or self.holds(sequence, start)
        self._read.discard(sequence.sequence_id)
        self._write(sequence, start, start + len(piece.token_ids), is_own)
        return is_own

    def decoded(self, piece: SequenceSlice) -> bool:
        """A token goes through the model. False: it, or what it looks at, is not the sequence's own."""
        sequence, start = self._sequence(piece), piece.start
        own = output_run(sequence.request.params.seed or 0, start - sequence.num_prompt, 1)
        is_own = tuple(piece.token_ids) == own and self.reads_own(sequence, start, 1)
        self._write(sequence, start, start + 1, is_own)
        return is_own

    def reads_own(self, sequence: Sequence, start: int, count: int) -> bool:
        """Whether decode steps at positions start .. start+count-1 find the sequence's own KV. All of it is looked at when the first step
        comes and when a block is begun."""
        number = sequence.sequence_id
        if number in self._read and start % BLOCK_SIZE and start % BLOCK_SIZE + count <= BLOCK_SIZE:
            return True
        is_own = self.holds(sequence, start)
        if is_own:
            self._read.add(number)
        return is_own

    def decoded_run(self, sequence: Sequence, count: int) -> None:
        """The last `count` tokens of a sequence came by decode steps for which `reads_own` was true."""
        self._write(sequence, sequence.num_computed - count, sequence.num_computed, True)

    def _sequence(self, piece: SequenceSlice) -> Sequence:
        sequence = self.sequence_of(piece.sequence_id)
        assert sequence is not None
        return sequence

    def _write(self, sequence: Sequence, start: int, end: int, is_own: bool) -> None:
        numbers, blocks = self._numbers_of(sequence), sequence.table.blocks
        num_full, rest = divmod(end, BLOCK_SIZE)
        for layer in self.layers:
            for place in range(start // BLOCK_SIZE, num_full):
                layer[blocks[place]] = numbers[place] if is_own else SPOILT
            if rest:
                layer[blocks[num_full]] = _partly(numbers[num_full], rest) if is_own else SPOILT

    def _numbers_of(self, sequence: Sequence) -> list[int]:
        """The hash of a full block of the prompt covers all tokens before it as well; behind the prompt the seed says what follows."""
        numbers = self._numbers.get(sequence.sequence_id)
        if numbers is None:
            request, prompt = sequence.request, sequence.request.prompt_token_ids
            assert isinstance(prompt, PromptTokens)
            hashes = prompt.chain(BLOCK_SIZE, request.cache_salt).hashes
            tail = prompt[len(hashes) * BLOCK_SIZE :]
            beginning = hash((hashes[-1] if hashes else 0, tail, request.params.seed))
            num_blocks = -(-(len(prompt) + request.params.max_tokens) // BLOCK_SIZE)
            numbers = hashes + [(beginning + place * _BY_BLOCK) & _MASK for place in range(len(hashes), num_blocks)]
            if len(self._numbers) >= self._room:
                self._forget_ended()
            self._numbers[sequence.sequence_id] = numbers
        return numbers

    def _forget_ended(self) -> None:
        self._numbers = {number: kept for number, kept in self._numbers.items() if self.sequence_of(number) is not None}
        self._read &= self._numbers.keys()
        self._room = max(FEW, 2 * len(self._numbers))


def _partly(number: int, num_tokens: int) -> int:
    """Of a block that would have this number if it were full, and has so many tokens."""
    return (number + num_tokens * _BY_TOKEN) & _MASK
