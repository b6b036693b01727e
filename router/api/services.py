"""What every endpoint works with."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.api.asking import Seeker
from router.api.bodies import OpenBodies
from router.api.callers import Callers
from router.api.grammar_check import GrammarChecks
from router.api.metrics import Metrics
from router.api.response_store import ResponseStore
from router.api.turns import Turns
from router.api.unattended import Unattended
from router.backend import Backend
from router.config import ApiConfig
from workers.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Services:
    """What every endpoint works with."""

    backend: Backend
    tokenizer: Tokenizer
    config: ApiConfig
    metrics: Metrics
    bodies: OpenBodies
    grammars: GrammarChecks
    turns: Turns
    callers: Callers
    responses: ResponseStore = field(default_factory=ResponseStore)
    seeker: Seeker = field(init=False)
    unattended: Unattended = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeker", Seeker(self.backend))
        object.__setattr__(self, "unattended", Unattended(self.config.client_grace_s))
