"""The numbers of all workers in columns, so that a choice among a thousand of them is a few vector operations. Knows no requests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


NOTHING, ANYTHING = -(1 << 40), 1 << 40


class WorkerTable:
    """One row a worker; a row that is free takes no requests. Rows are written by `router.fleet.view` as each worker's state changes."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.seeds: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        """A fixed random number of each worker, the same in every router."""
        self.can_decode: Flags = np.zeros(0, np.bool_)
        self.can_prefill: Flags = np.zeros(0, np.bool_)
        self.num_sequences: Numbers = np.zeros(0, np.int64)
        """What a worker has reported and what was sent to it since; so are the next two."""
        self.prefill_tokens: Numbers = np.zeros(0, np.int64)
        self.free_blocks: Numbers = np.zeros(0, np.int64)
        self.takes_blocks: Numbers = np.zeros(0, np.int64)
        """So many blocks may the prompt of a request need that is sent there now; NOTHING, ANYTHING: whatever it needs."""
        self.takes_prompt: Flags = np.zeros(0, np.bool_)
        """A prompt more may be sent there to be computed."""
        self.wanted_blocks = ANYTHING
        """What has to wait needs a worker that takes so many; ANYTHING: it waits for one that takes a prompt."""
        self.num_taking = self.num_decoding = self.num_prefilling = 0
        """Workers that take requests; of these, those that can decode, and that can prefill."""
        self.has_opened = False
        """A worker has come that may take what had to wait."""
        self._free_rows: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, worker_id: str) -> int:
        """A row for a worker."""
        seed = xxhash.xxh3_64_intdigest(worker_id.encode())
        if self._free_rows:
            row = self._free_rows.pop()
            self.ids[row] = worker_id
            self.seeds[row] = seed
            return row
        self.ids.append(worker_id)
        self.seeds = np.append(self.seeds, np.uint64(seed))
        self.can_decode = np.append(self.can_decode, False)
        self.can_prefill = np.append(self.can_prefill, False)
        self.num_sequences = np.append(self.num_sequences, 0)
        self.prefill_tokens = np.append(self.prefill_tokens, 0)
        self.free_blocks = np.append(self.free_blocks, 0)
        self.takes_blocks = np.append(self.takes_blocks, NOTHING)
        self.takes_prompt = np.append(self.takes_prompt, False)
        return len(self.ids) - 1

    def remove(self, row: int) -> None:
        """The worker has been closed before: its row takes no requests."""
        self.ids[row] = ""
        self._free_rows.append(row)

    def count(self, takes: int, decodes: int, prefills: int) -> None:
        """A worker's roles have changed by this much."""
        self.num_taking += takes
        self.num_decoding += decodes
        self.num_prefilling += prefills
