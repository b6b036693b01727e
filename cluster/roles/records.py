"""What the role controllers of a cluster keep in the store, and how it is written: JSON under control/. Knows no store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from cluster.roles.switches import RoleSwitch
from cluster.roles.values import Decision
from router.requests.demand import DemandReport
from router.roles import Order

CONTROL = "control/"
LEADER = "control/leader"
"""A lease: the router whose controller acts."""
SWITCHES = "control/switch/"
"""By worker: its switch that is under way, or its last one."""
PINS = "control/pin/"
ORDERS = "control/order/"
"""By worker, a lease: what an operator has asked another router for."""
ANSWERS = "control/answer/"
"""By order, a lease: empty when it was carried out, else why not."""
DEMANDS = "control/demand/"
"""By router, a lease."""
AUDIT = "control/audit/"
"""A ring of steps, by number modulo its size."""
DECISIONS = "control/decision/"
"""A ring of decisions."""
MAX_WORDS = 500
"""Characters of a sentence that is kept."""
MAX_NUMBERS, MAX_NUMBER = 256, 1e12
"""In what a router has measured: how many, and how large each may be."""


def encode(value: Any) -> str:
    """A dataclass, or a mapping, as JSON."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} is not kept in the store")


def decode(text: str) -> dict[str, Any]:
    """The mapping in an entry; empty for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def switch_of(text: str) -> RoleSwitch | None:
    """None: it is none."""
    switch: RoleSwitch | None = _read(RoleSwitch, decode(text))
    return switch if switch is not None and 0 <= switch.generation < 2**63 else None


def demand_of(text: str) -> DemandReport | None:
    """None: it is none, or holds numbers that nobody measures."""
    demand: DemandReport | None = _read(DemandReport, decode(text))
    if demand is None:
        return None
    told = [getattr(demand, field.name) for field in dataclasses.fields(demand)]
    numbers = [number for value in told for number in (value if isinstance(value, tuple) else (value,))]
    return demand if len(numbers) <= MAX_NUMBERS and all(0 <= number <= MAX_NUMBER for number in numbers) else None


def order_of(text: str) -> tuple[str, Order] | None:
    """With its name."""
    values = decode(text)
    name, order = values.get("name"), _read(Order, values.get("order"))
    return (name, order) if isinstance(name, str) and order is not None else None


def number_of(record: Mapping[str, object]) -> int | None:
    """Of a record in a ring; None: it is none."""
    number = record.get("number")
    return number if type(number) is int and 0 <= number < 2**63 else None


def _read(kind: type, values: object) -> Any:
    """An instance of a dataclass whose fields all have their types, every number finite; None for anything else, and for nothing at all."""
    if not values:
        return None
    try:
        return _reader(kind).model_validate({"value": values}).value
    except ValidationError:
        return None


@cache
def _reader(kind: type) -> Any:
    """A model with one field: its configuration holds for the plain dataclass below it."""
    return create_model("Record", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), value=(kind, ...))


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One step of one switch. `at_s`: since 1970; `took_s`: the phase that it ends."""

    number: int
    at_s: float
    switch: str
    worker_id: str
    step: str
    source: str
    target: str
    by: str
    reason: str
    took_s: float = 0.0
    leader: str = ""
    why: str = ""


def decision_page(decision: Decision, at_s: float, mode: str) -> dict[str, Any]:
    """A decision as `baton roles --explain` shows it."""
    forecast = dataclasses.asdict(decision.forecast)
    return {
        "number": decision.number,
        "at_s": round(at_s, 3),
        "mode": mode,
        "reason": decision.reason,
        "moves": [{"worker_id": m.worker_id, "from": m.source.value, "to": m.target.value} for m in decision.moves],
        "inputs": {name: _rounded(value) for name, value in forecast.items()},
        "now": _alternative(decision.now),
        "chosen": _alternative(decision.best),
        "alternatives": [_alternative(other) for other in decision.alternatives],
        "predicted_gain": _rounded(decision.gain),
        "desired_workers": decision.desired_workers,
        "effect": None if decision.effect is None else _rounded(dataclasses.asdict(decision.effect)),
    }


def _alternative(alternative: Any) -> dict[str, Any]:
    return {"split": dict(alternative.split._asdict()), "goodput": _rounded(alternative.goodput)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
