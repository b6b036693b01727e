"""What a simulation leaves behind: one record a request, samples of workers, switches, faults, and the settings and seed that repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_SAMPLES = 200_000
"""Of all workers together; when there are as many, every other one goes and the interval doubles."""
MAX_EVENTS = 100_000
"""Switches and faults each."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request from its arrival to its end. Times are virtual seconds from the trace's begin; None: it did not come so far."""

    name: str
    arrival_s: float
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in a prefix cache."""
    output_tokens: int
    """That the client has."""
    first_token_s: float | None
    finished_s: float | None
    """When the client had the last token, or the refusal."""
    queue_s: float
    """Without blocks: in the router's queue, and at the decode worker."""
    transfer_s: float
    """From the word that the prompt is computed to the last KV byte in place: what the handoff adds to the first token."""
    prefill_worker: str
    """That computed the prompt; the decode worker itself where it was computed there."""
    decode_worker: str
    """That said the last token."""
    outcome: str
    """`ok`, or the name of a refusal (workers.errors.Refusal), or `cancelled` by the client."""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    max_gap_s: float = 0.0
    """The longest wait between two tokens."""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.finished_s is None or self.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def is_good(self) -> bool:
        """Ended well and within its targets; one without targets only has to end well."""
        if self.outcome != "ok":
            return False
        ttft, tpot = self.ttft_s, self.tpot_s
        is_late = self.ttft_target_s is not None and (ttft is None or ttft > self.ttft_target_s)
        is_slow = self.tpot_target_s is not None and tpot is not None and tpot > self.tpot_target_s
        return not (is_late or is_slow)


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker at one moment. `running` and `waiting` count sequences, `kv_used` is the share of the pool that is held,
    `busy` the share of the time since the sample before in which a step ran."""

    at_s: float
    worker: str
    role: str
    running: int
    waiting: int
    kv_used: float
    busy: float


@dataclass(frozen=True, slots=True)
class RouterSample:
    """What all routers together had at one moment: requests in their queues, and requests under way."""

    at_s: float
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class Switch:
    """A worker has another role, in the generation that began with it."""

    at_s: float
    worker: str
    role: str
    generation: int


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """A fault that was inflicted, as its line in a file of faults says it."""

    at_s: float
    kind: str
    target: str
    text: str


@dataclass(slots=True)
class RunRecord:
    """A whole simulation. `settings` are plain JSON values; with `seed` they repeat it."""

    settings: dict[str, Any]
    seed: int
    requests: list[RequestRecord] = field(default_factory=list)
    samples: list[WorkerSample] = field(default_factory=list)
    router_samples: list[RouterSample] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    sample_interval_s: float = 1.0
    duration_s: float = 0.0
    """Virtual."""
    num_events: int = 0
    num_steps: int = 0
    """Engine steps, also those that were taken many at a time."""
    wall_s: float = 0.0
    peak_rss_bytes: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    """The product's own, of all routers and workers, by name."""

    def thin(self) -> None:
        """Keeps every other moment of the samples when there are too many; whoever takes them asks for the interval after that."""
        if len(self.samples) >= MAX_SAMPLES:
            moments = sorted({sample.at_s for sample in self.samples})
            kept = set(moments[::2])
            self.samples = [sample for sample in self.samples if sample.at_s in kept]
            self.router_samples = [sample for sample in self.router_samples if sample.at_s in kept]
            self.sample_interval_s *= 2

    def lines(self) -> Iterator[str]:
        """As JSON lines: a header, then the entries."""
        entries: tuple[tuple[str, Iterable[Any]], ...] = (
            ("request", self.requests),
            ("sample", self.samples),
            ("router", self.router_samples),
            ("switch", self.switches),
            ("fault", self.faults),
        )
        header = {name: getattr(self, name) for name in _HEADER}
        yield json.dumps({"entry": "run", **header})
        for entry, values in entries:
            for value in values:
                yield json.dumps({"entry": entry, **asdict(value)})

    @classmethod
    def of_lines(cls, lines: Iterable[str]) -> RunRecord:
        """What `lines` wrote. Raises ValueError for anything else."""
        record: RunRecord | None = None
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
                kind = value.pop("entry")
                if kind == "run":
                    record = cls(**value)
                    continue
                if record is None:
                    raise ValueError("a record begins with its header")
                name, entry = _ENTRIES[kind]
                getattr(record, name).append(entry(**value))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"line {number} is no part of a simulation's record: {error}") from error
        if record is None:
            raise ValueError("the record is empty")
        return record


_HEADER = (
    "settings",
    "seed",
    "sample_interval_s",
    "duration_s",
    "num_events",
    "num_steps",
    "wall_s",
    "peak_rss_bytes",
    "counters",
)
_ENTRIES: dict[str, tuple[str, type]] = {
    "request": ("requests", RequestRecord),
    "sample": ("samples", WorkerSample),
    "router": ("router_samples", RouterSample),
    "switch": ("switches", Switch),
    "fault": ("faults", FaultRecord),
}
