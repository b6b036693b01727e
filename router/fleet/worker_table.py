"""The numbers of all workers in columns, so that a choice among a thousand of them is a few vector operations. Knows no requests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Seconds = npt.NDArray[np.float64]

NOTHING, ANYTHING = -(1 << 40), 1 << 40
NUM_WORK = 5
"""Kinds of work that a step's time is made of (router.forecast.steps.WORK)."""
NUM_RATIOS = 9
"""Steps of a worker whose median says how fast it is: four odd ones among them change nothing."""
LENT_S = 5.0
"""So far back it counts what prompts have taken from sequences that decode beside them: about an answer."""
_COLUMNS = (
    "seeds", "can_decode", "can_prefill", "num_sequences", "prefill_tokens", "free_blocks", "takes_blocks", "takes_prompt",
    "batch_tokens", "steps", "has_step", "lent_s", "num_steps", "kinds", "ratios", "speeds", "seconds", "looked_back", "is_known",
)  # fmt: skip


class WorkerTable:
    """One row a worker; a row that is free takes no requests. Rows are written by `router.fleet.worker_entry` as each worker's state changes."""

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
        self.batch_tokens: Numbers = np.zeros(0, np.int64)
        """What one step computes at most."""
        self.steps: Seconds = np.zeros((0, NUM_WORK + 1))
        """The step that a worker has reported last: its work, and its seconds. `has_step`: nobody has learnt from it yet."""
        self.has_step: Flags = np.zeros(0, np.bool_)
        self.lent_s: Seconds = np.zeros(0)
        """Seconds that prompts have taken from sequences that decode there, of the last LENT_S or so: older ones fade."""
        self.num_steps: Numbers = np.zeros(0, np.int64)
        """That were learnt from."""
        self.kinds: Numbers = np.zeros(0, np.int64)
        """What follows is written by `router.forecast.steps`."""
        self.ratios: Seconds = np.zeros((0, NUM_RATIOS))
        """Of a worker's last steps: their times in relation to what is usual for its kind."""
        self.speeds: Seconds = np.zeros(0)
        """The median of these; above 1: slower than its kind."""
        self.seconds: Seconds = np.zeros((0, NUM_WORK))
        """What a unit of each kind of work takes the worker."""
        self.looked_back: Seconds = np.zeros(0)
        """Tokens before it that a prompt token looks at, as it was lately."""
        self.is_known: Flags = np.zeros(0, np.bool_)
        """Those seconds were measured, of some worker of its kind."""
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
            self.has_step[row], self.num_steps[row], self.lent_s[row] = False, 0, 0.0
            return row
        self.ids.append(worker_id)
        for name in _COLUMNS:
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column, shape=(1, *column.shape[1:]))]))
        self.seeds[-1] = seed
        self.takes_blocks[-1] = NOTHING
        return len(self.ids) - 1

    def note_step(
        self, row: int, decodes: int, context: int, prompt_tokens: int, prompt_context: int, seconds: float
    ) -> None:
        """A worker's last step, in the order of WORK, for whoever learns from it."""
        self.steps[row] = (1, decodes, context, prompt_tokens, prompt_context, seconds)
        self.has_step[row] = decodes + prompt_tokens > 0
        if decodes and prompt_tokens:
            unit = self.seconds[row]
            self.lent_s[row] += prompt_tokens * unit[3] + prompt_context * unit[4]

    def remove(self, row: int) -> None:
        """The worker has been closed before: its row takes no requests."""
        self.ids[row] = ""
        self._free_rows.append(row)

    def count(self, takes: int, decodes: int, prefills: int) -> None:
        """A worker's roles have changed by this much."""
        self.num_taking += takes
        self.num_decoding += decodes
        self.num_prefilling += prefills
