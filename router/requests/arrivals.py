"""Judges requests as they come: whether the served model can take one, and whether its targets can be met. Knows no queue and no attempt."""

from __future__ import annotations

from dataclasses import replace

from router.config import RouterConfig
from router.events import Reject
from router.fleet.fleet import Fleet
from router.policies.promise import WaitingLine
from router.requests.dispatch import Dispatcher
from router.requests.in_flight import InFlightRequest
from router.wishes import Wishes
from workers.errors import Refusal
from workers.kv_cache.block_hash import block_hashes
from workers.request import Request


class Arrivals:
    """By the config, and by the model and the workers of the moment."""

    def __init__(self, config: RouterConfig, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._config = config
        self._fleet = fleet
        self._dispatcher = dispatcher

    def with_defaults(self, wishes: Wishes) -> Wishes:
        """With the config's targets where the client has named none."""
        ttft_s = 0.0 if wishes.round > 1 else wishes.ttft_s or self._config.ttft_target_s
        tpot_s = wishes.tpot_s or self._config.tpot_target_s
        return (
            wishes
            if (ttft_s, tpot_s) == (wishes.ttft_s, wishes.tpot_s)
            else replace(wishes, ttft_s=ttft_s, tpot_s=tpot_s)
        )

    def hash(self, flight: InFlightRequest) -> None:
        """Names the blocks of its prompt, unless that has been done for this model. The choices of a client's request have one
        prompt object among them (PromptTokens): it is hashed once."""
        model, prompt = self._fleet.model, flight.request.prompt_token_ids
        if model is None or flight.block_size == model.block_size:
            return
        block_size = flight.block_size = model.block_size
        flight.hashes = block_hashes(prompt, block_size, flight.request.cache_salt)

    def unfit(self, request: Request) -> Reject | None:
        """Why the served model cannot take a request."""
        name, model, num_tokens = request.request_id, self._fleet.model, len(request.prompt_token_ids)
        if model is None:
            return Reject(name, Refusal.NO_WORKERS, "no worker has connected yet", retry_after_s=1.0)
        if num_tokens == 0:
            return Reject(name, Refusal.INVALID, "the prompt is empty", "prompt")
        if num_tokens >= model.max_model_len:
            what = f"the prompt has {num_tokens} tokens; prompt and output have room for {model.max_model_len}"
            return Reject(name, Refusal.INVALID, what, "prompt")
        return None

    def out_of_reach(self, flight: InFlightRequest, line: WaitingLine, now: float) -> Reject | None:
        """Why a request with targets is refused at its arrival behind `line`, where that is wanted: they cannot be met."""
        wishes = flight.wishes
        if self._config.admission != "strict" or not (wishes.ttft_s or wishes.tpot_s):
            return None
        self.hash(flight)
        expected = self._dispatcher.promise(flight, line, now)
        miss = expected.miss(wishes.ttft_s, wishes.tpot_s) if expected is not None else ""
        if expected is None or not miss:
            return None
        retry_s = max(1.0, expected.ttft_s - wishes.ttft_s)
        return Reject(flight.request.request_id, Refusal.TARGET_MISSED, miss, retry_after_s=retry_s)
