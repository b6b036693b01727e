"""What the role controllers of a cluster keep in the store, and how it is written: JSON under control/. Knows no store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cluster.roles.switches import Phase, RoleSwitch
from cluster.roles.values import Decision
from router.requests.demand import DemandReport
from router.roles import Order
from workers.status import Role

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
    values = decode(text)
    try:
        roles = {name: Role(values[name]) for name in ("source", "target")}
        switch = RoleSwitch(**{**values, **roles, "phase": Phase(values["phase"])})
        return switch if isinstance(switch.generation, int) and isinstance(switch.worker_id, str) else None
    except (KeyError, TypeError, ValueError):
        return None


def demand_of(text: str) -> DemandReport | None:
    values = decode(text)
    try:
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        demand = DemandReport(**{**values, **tuples})
        ok = len(demand.arrivals_per_s) == 3 and all(
            isinstance(number, int | float) for number in (*demand.arrivals_per_s, demand.waiting_tokens)
        )
        return demand if ok else None
    except (TypeError, ValueError):
        return None


def order_of(text: str) -> tuple[str, Order] | None:
    """With its name."""
    values = decode(text)
    try:
        name, order = values["name"], values["order"]
        role = Role(order["role"]) if order["role"] is not None else None
        return str(name), Order(**{**order, "role": role})
    except (KeyError, TypeError, ValueError):
        return None


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
