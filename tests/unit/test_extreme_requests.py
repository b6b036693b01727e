"""The extreme of every field of every body is known, is answered or refused as the caller's fault, and keeps no neighbour waiting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from fake_backend import MODEL, open_api
from test_bench_serve import load

from cluster.sim.model import BytelessMemory, EngineClock, TimedRunner, layout_of, make_detokenizer
from cluster.sim.profiles.profile import LinearCost, Profile
from router.config import ApiConfig
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.errors import InvalidRequest, Refused
from workers.kv_cache.block_hash import PromptTokens
from workers.request import Request, SamplingParams
from workers.scheduler.scheduler import Limits

extremes = load("extreme_requests")

API = ApiConfig(max_body_bytes=1 << 20)
"""The cost of a body grows with its size alone."""
LONG = replace(MODEL, max_model_len=8192)
ANSWERS = {200, 400, 404, 413, 429}
WAIT_S = 0.1
"""Of the model's time, which no other program on this machine changes."""
NUM_STEPS = 30
"""With a case; then it has shown what it does to others."""


class Victim:
    """A sequence that decodes on an engine whose steps take, in virtual time, what the shipped model takes on two cores; requests
    come and go beside it."""

    def __init__(self) -> None:
        config = WorkerConfig(model="any")
        cost = LinearCost(0.003, 6e-5, 6e-8, 2e-5, 4e-7)
        profile = Profile(cost=cost, num_blocks=64 * 128, max_model_len=LONG.max_model_len)
        memory = BytelessMemory(layout_of(profile, 1))
        self._now = 0.0
        self._clock = EngineClock(lambda: self._now)
        self._engine = Engine(
            TimedRunner(profile, memory, self._clock),
            Limits(
                config.max_num_seqs,
                config.max_batch_tokens,
                config.max_queue,
                0,
                config.max_prefill_pause_s,
                config.max_decode_pause_s,
            ),
            make_detokenizer=make_detokenizer,
            eos_token_ids=(),
            max_model_len=1 << 30,
            overlap_steps=False,
            clock=self._clock,
        )
        memory.content.sequence_of = self._engine.sequence
        self.longest_s = 0.0
        self.num_served = 0
        prompt = PromptTokens((5, 6, 7))
        self._engine.add(0, Request("victim", prompt, SamplingParams(max_tokens=100_000, ignore_eos=True)))
        self._ids = iter(range(1, 1 << 30))
        self._run(NUM_STEPS)

    def beside(self, requests: Sequence[Request]) -> None:
        """All of them come at once; some are refused, as by a worker."""
        added, prompts = [], {}
        for request in requests:
            number, prompt = next(self._ids), request.prompt_token_ids
            prompts.setdefault(id(prompt), prompt if isinstance(prompt, PromptTokens) else PromptTokens(prompt))
            with suppress(InvalidRequest, Refused):
                self._engine.add(number, replace(request, prompt_token_ids=prompts[id(prompt)]))
                added.append(number)
        self.num_served += len(added)
        self._run(NUM_STEPS)
        for number in added:
            self._engine.cancel(number)

    def _run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            outputs = self._engine.step().outputs
            assert [output for number, output in outputs if number == 0], "a step without a token of the victim"
            self.longest_s = max(self.longest_s, self._clock.ahead_s)
            self._now, self._clock.ahead_s = self._clock(), 0.0


def test_every_extreme_of_every_field_is_answered_or_refused_and_keeps_no_neighbour_waiting() -> None:
    """A field that is new fails here: say in bench/extreme_requests.py what the most is that may be asked of it."""
    answers, victim = [], Victim()
    with open_api(API) as api:
        for case in extremes.cases(LONG.vocab_size, LONG.max_model_len, API):
            api.backend.reset()
            api.backend.model = LONG
            answer = api.http.post(case.path, content=json.dumps(case.body).encode())
            assert answer.status_code in ANSWERS, (case.path, case.name, answer.text[:300])
            assert "internal error" not in answer.text, (case.path, case.name)
            answers.append(answer.status_code)
            victim.beside(api.backend.requests)
            assert victim.longest_s <= WAIT_S, (case.path, case.name, victim.longest_s)
    assert {200, 400} <= set(answers) and victim.num_served > 2000
