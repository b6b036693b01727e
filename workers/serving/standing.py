"""What a worker is now, and what it therefore takes: role and generation, draining, suspension, its end. Knows no request and no stream."""

from __future__ import annotations

import logging

from workers.errors import Refusal, Refused
from workers.handoff.protocol.messages import OpenHandoff, PromptSubject
from workers.kv_memory.memory import KvLayout, same_shape
from workers.serving.events import TellDrain, TellRole
from workers.status import Identity, Role
from workers.wire.attach import Submit

log = logging.getLogger(__name__)

MAX_BLOCKS = 1 << 24
"""Entries of a block table that are spoken of: a thousand million tokens."""


class Standing:
    """Owns the identity; others read it. `layout` and `fingerprint` are those of the model that it serves."""

    def __init__(self, identity: Identity, layout: KvLayout, fingerprint: str) -> None:
        self.identity = identity
        self._layout = layout
        self._fingerprint = fingerprint
        self._is_closed = False

    def switch(self, role: Role) -> list[TellRole | TellDrain]:
        """At once: what runs here runs on to its end, what comes from now on meets the new role."""
        me = self.identity
        if role is me.role:
            return []
        log.info("%s switches from %s to %s", me.worker_id, me.role, role)
        me.role = role
        me.generation += 1
        return [TellRole(role, me.generation)]

    def drain(self, is_draining: bool, remember: bool) -> list[TellRole | TellDrain]:
        """What runs here runs on, until routers move it."""
        me = self.identity
        if is_draining is me.is_draining:
            return []
        log.info("%s %s", me.worker_id, "drains" if is_draining else "takes new work again")
        me.is_draining = is_draining
        return [TellDrain(is_draining)] if remember else []

    def suspend(self, reason: str) -> list[TellRole | TellDrain]:
        """Nothing is accepted until `resume`, and a new generation begins. Nothing when that has been said already."""
        me = self.identity
        if me.is_rebuilding:
            return []
        log.warning("%s suspends: %s", me.worker_id, reason)
        me.is_rebuilding = True
        me.generation += 1
        return [TellRole(me.role, me.generation)]

    def resume(self) -> None:
        self.identity.is_rebuilding = False

    def close(self) -> None:
        """For good."""
        self._is_closed = True

    def check_request(self, submit: Submit) -> None:
        """Whether a router's request is taken. Raises Refused."""
        me = self.identity
        if self._is_closed:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} is stopping")
        if me.is_draining:
            raise Refused(Refusal.DRAINING, f"{me.worker_id} drains")
        if me.is_rebuilding:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} waits for a rank")
        if not me.role.can_decode:
            raise Refused(Refusal.WRONG_ROLE, f"{me.worker_id} is a {me.role} worker")
        if submit.generation != me.generation:
            raise Refused(
                Refusal.STALE_GENERATION, f"{me.worker_id} is in generation {me.generation}, not {submit.generation}"
            )

    def check_handoff(self, opening: OpenHandoff, generation: int) -> None:
        """Whether something is handed over. `generation` is the receiver's as its envelope says. Raises Refused."""
        me, is_prompt = self.identity, isinstance(opening.subject, PromptSubject)
        if opening.target.generation != generation:
            raise Refused(Refusal.STALE_GENERATION, "the receiver contradicts itself about its generation")
        if opening.source_generation != me.generation:
            raise Refused(
                Refusal.STALE_GENERATION,
                f"{me.worker_id} is in generation {me.generation}, not {opening.source_generation}",
            )
        if me.is_rebuilding:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} waits for a rank")
        if is_prompt and me.is_draining:
            raise Refused(Refusal.DRAINING, f"{me.worker_id} drains")
        if is_prompt and not me.role.can_prefill:
            raise Refused(Refusal.WRONG_ROLE, f"{me.worker_id} is a {me.role} worker")
        if opening.model_fingerprint != self._fingerprint or not same_shape(opening.layout, self._layout):
            raise Refused(Refusal.INVALID, f"{me.worker_id} serves another model or KV layout")
        if opening.first_block < 0 or opening.num_blocks < 0 or opening.first_block + opening.num_blocks > MAX_BLOCKS:
            raise Refused(Refusal.INVALID, "no sequence has blocks of such numbers")
