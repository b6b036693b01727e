"""Measures llama.cpp through llama-cpp-python's C bindings, in a process of its own. Driven by bench/engine.py.

A context holds exactly the sequences of one measurement, each with its own KV stream, which is llama.cpp's fastest
layout. Tokens are drawn with numpy's argmax: less work than its sampler chain, which sorts a table of candidates.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
from json_worker import serve
from llama_state import UnknownState, lengthen

ROOM = 256
"""Positions of a sequence beyond its prompt."""
MAX_BATCH_TOKENS = 2048
WARMING_TOKENS = 512
"""As many as llama.cpp computes at once by default."""
FILLED_FROM = 16
"""Tokens whose keys and values are repeated to fill a context."""

Row = tuple[int, int, int, bool]
"""Token, its position, its sequence, whether its logits are wanted."""


class LlamaEngine:
    """Implements json_worker.MeasuredEngine. `dtype` is that of the GGUF file, so it changes nothing here."""

    def __init__(self, path: str, dtype: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._num_threads = num_threads
        self._vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        with self._context(1, len(prompt) + num_tokens) as context:
            tokens = self._prefill(context, prompt, 0)
            while len(tokens) < num_tokens:
                tokens += self._run(context, [(tokens[-1], len(prompt) + len(tokens) - 1, 0, True)])
        return tokens

    def prefill(self, prompt: list[int]) -> float:
        with self._context(1, len(prompt)) as context:
            self._prefill(context, prompt[:WARMING_TOKENS], 0)  # a new context's first use faults its buffers in
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            started = time.perf_counter()
            self._prefill(context, prompt, 0)
            return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], num_steps: int, is_filled: bool) -> dict[str, Any]:
        with self._context(len(prompts), len(prompts[0]) + num_steps) as context:
            start = self._fill if is_filled else self._prefill
            tokens = [start(context, prompt, place)[0] for place, prompt in enumerate(prompts)]
            step_s = []
            for step in range(num_steps):
                started = time.perf_counter()
                position = len(prompts[0]) + step
                tokens = self._run(context, [(token, position, place, True) for place, token in enumerate(tokens)])
                step_s.append(time.perf_counter() - started)
        return {"step_s": step_s}

    @contextmanager
    def _context(self, num_sequences: int, num_tokens: int) -> Iterator[Any]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_sequences * (num_tokens + ROOM)
        params.n_batch = MAX_BATCH_TOKENS
        params.n_seq_max = num_sequences
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = self._num_threads
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    def _prefill(self, context: Any, prompt: list[int], sequence: int) -> list[int]:
        """Computes a prompt; its first token, as a list of one."""
        last = len(prompt) - 1
        rows = [(token, position, sequence, position == last) for position, token in enumerate(prompt)]
        for first in range(0, len(rows), MAX_BATCH_TOKENS):
            tokens = self._run(context, rows[first : first + MAX_BATCH_TOKENS])
        return tokens

    def _fill(self, context: Any, prompt: list[int], sequence: int) -> list[int]:
        """Gives a sequence as many positions as its prompt has tokens, repeating the first ones; a token to go on with.

        Where llama.cpp does not take a state made so, the prompt is computed.
        """
        self._prefill(context, prompt[:FILLED_FROM], sequence)
        size = llama_cpp.llama_state_seq_get_size(context, sequence)
        state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(context, state, size, sequence)
        try:
            filled = lengthen(bytes(state), len(prompt))
        except UnknownState as error:
            print(f"prompts are computed: {error}", file=sys.stderr)
        else:
            buffer = (ctypes.c_uint8 * len(filled)).from_buffer_copy(filled)
            if llama_cpp.llama_state_seq_set_data(context, buffer, len(filled), sequence) == len(filled):
                return [prompt[-1]]
            print("prompts are computed: llama.cpp does not take a lengthened state", file=sys.stderr)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), sequence, -1, -1)
        return self._prefill(context, prompt, sequence)

    def _run(self, context: Any, rows: list[Row]) -> list[int]:
        """One llama_decode; the most likely token of each row that wants logits."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = wanted
            failure = llama_cpp.llama_decode(context, batch)
            if failure:
                raise RuntimeError(f"llama_decode returned {failure}")
            return [self._argmax(context, i) for i, row in enumerate(rows) if row[3]]
        finally:
            llama_cpp.llama_batch_free(batch)

    def describe(self) -> str:
        """The features that llama.cpp was built with and found."""
        text: bytes = llama_cpp.llama_print_system_info()
        return " ".join(
            feature.replace(" = 1", "").strip().removeprefix("CPU : ")
            for feature in text.decode().split("|")
            if feature.strip().endswith("= 1")
        )

    def _argmax(self, context: Any, row: int) -> int:
        logits = ctypes.cast(llama_cpp.llama_get_logits_ith(context, row), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


if __name__ == "__main__":
    serve(f"llama-cpp-python {llama_cpp.__version__}", LlamaEngine)
