"""What goes wrong in a simulation, and when: values, how they are written, and how they are drawn by seed. Inflicts nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.sim.product import InvalidConfig, Role

KINDS = {
    "kill": ("restart",),
    "hang": ("for",),
    "slow": ("factor", "for"),
    "cut": ("for", "from"),
    "late": ("by", "for"),
    "lose": ("share", "for"),
    "store": ("for", "empty"),
    "switch": ("role",),
    "drain": (),
    "undrain": (),
    "pin": (),
    "unpin": (),
}
"""What each kind takes beside time and target."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`target` is a worker, a router, or several of them with commas; the store has none.

    kill: the process ends; another one starts `restart_s` later, never when that is None. hang: it stands still for `for_s`. slow: steps
    take `factor` times as long. cut: nothing passes between the targets and `others` (none named: everybody else). late: messages come
    `by_s` later. lose: a `share` of the messages is lost. store: it is away, and `is_empty` when it comes back. switch: the worker is
    told to take `role`. drain, undrain: it is told to take no new work, or to take it again. pin, unpin: the role controller is
    told to leave it alone, or not. Where there is a role controller these are orders to it.
    """

    at_s: float
    kind: str
    target: str = ""
    for_s: float = 0.0
    restart_s: float | None = None
    factor: float = 1.0
    by_s: float = 0.0
    share: float = 0.0
    others: str = ""
    role: str = ""
    is_empty: bool = False

    @property
    def targets(self) -> frozenset[str]:
        return frozenset(filter(None, self.target.split(",")))

    @property
    def end_s(self) -> float:
        """When its cause is over."""
        return self.at_s + max(self.for_s, self.restart_s or 0.0)

    def __str__(self) -> str:
        words = [f"{self.at_s:g}", self.kind, *([self.target] if self.target else [])]
        values = {
            "restart": self.restart_s, "for": self.for_s or None, "factor": self.factor if self.factor != 1 else None,
            "by": self.by_s or None, "share": self.share or None, "from": self.others or None, "role": self.role or None,
        }  # fmt: skip
        for name, value in values.items():
            if value is not None:
                words.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
        return " ".join(words + (["empty"] if self.is_empty else []))


_FIELDS = {"for": "for_s", "restart": "restart_s", "factor": "factor", "by": "by_s", "share": "share", "from": "others", "role": "role", "empty": "is_empty"}  # fmt: skip


def read_faults(path: Path) -> list[Fault]:
    """A file of faults: a line each, `AT KIND TARGET name=value ...` (# begins a comment), or a JSON array of objects with the keys
    at, kind, target and those names. Raises InvalidConfig with the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"cannot read the faults {path}: {error.strerror}") from error
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise InvalidConfig(f"cannot parse the faults {path}: {error}") from error
        return sorted((_fault_of(entry, f"{path}: fault {at}") for at, entry in enumerate(entries, 1)), key=_by_time)
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if words:
            faults.append(fault_of(words, f"{path}:{number}"))
    return sorted(faults, key=_by_time)


def _by_time(fault: Fault) -> float:
    return fault.at_s


def fault_of(words: Sequence[str], where: str = "a fault") -> Fault:
    """A fault from the words of its line. Raises InvalidConfig."""
    entry: dict[str, object] = dict(zip(("at", "kind"), words, strict=False))
    for word in words[2:]:
        name, has_value, value = word.partition("=")
        if has_value or name == "empty":
            entry[name] = value if has_value else True
        else:
            entry["target"] = name
    return _fault_of(entry, where)


def _fault_of(entry: object, where: str) -> Fault:
    if not isinstance(entry, dict):
        raise InvalidConfig(f"{where} is no object")
    kind = str(entry.get("kind", ""))
    if kind not in KINDS:
        raise InvalidConfig(f"{where}: {kind!r} is no kind of fault; there are {', '.join(KINDS)}")
    unknown = sorted(set(entry) - {"at", "kind", "target", *KINDS[kind]})
    if unknown:
        raise InvalidConfig(f"{where}: {kind} does not take {unknown[0]}")
    target = str(entry.get("target", ""))
    if not target and kind != "store":
        raise InvalidConfig(f"{where}: {kind} needs a target, such as decode-0")
    values: dict[str, object] = {}
    for name in KINDS[kind]:
        if name not in entry:
            continue
        value = entry[name]
        if name in ("from", "role"):
            values[_FIELDS[name]] = str(value)
        elif name == "empty":
            values["is_empty"] = bool(value)
        else:
            values[_FIELDS[name]] = _number(value, f"{where}: {name}")
    if kind == "switch" and values.get("role") not in {role.value for role in Role}:
        raise InvalidConfig(f"{where}: switch needs role=prefill, role=decode or role=mixed")
    return replace(Fault(_number(entry.get("at"), f"{where}: the time"), kind, target), **values)  # type: ignore[arg-type]


def _number(value: object, what: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise InvalidConfig(f"{what} must be a number of at least 0; it is {value!r}")
    return number


def random_faults(
    rng: random.Random, workers: Sequence[str], routers: Sequence[str], until_s: float, count: int
) -> list[Fault]:
    """`count` faults before `until_s`. Whatever is killed comes back, so that every request can end."""
    roles = [role.value for role in Role]
    drawn: list[Fault] = []
    for _ in range(count):
        at_s, worker = round(rng.uniform(0, until_s), 3), rng.choice(workers)
        for_s = round(rng.choice((0.3, 2.0, 7.0, 12.0)) * rng.uniform(0.5, 1.5), 3)
        match rng.choice(
            ("kill", "kill", "hang", "slow", "cut", "cut", "late", "lose", "store", "switch", "drain", "router")
        ):
            case "kill":
                drawn.append(Fault(at_s, "kill", worker, restart_s=for_s))
            case "hang":
                drawn.append(Fault(at_s, "hang", worker, for_s=for_s))
            case "slow":
                drawn.append(Fault(at_s, "slow", worker, for_s=for_s, factor=rng.choice((3.0, 20.0))))
            case "cut":
                others = rng.choice(("", rng.choice([*workers, *routers])))
                drawn.append(Fault(at_s, "cut", worker, for_s=for_s, others="" if others == worker else others))
            case "late":
                drawn.append(Fault(at_s, "late", worker, for_s=for_s, by_s=rng.choice((0.05, 0.6, 3.0))))
            case "lose":
                drawn.append(Fault(at_s, "lose", worker, for_s=for_s, share=rng.choice((0.01, 0.2))))
            case "store":
                drawn.append(Fault(at_s, "store", for_s=for_s, is_empty=rng.random() < 0.5))
            case "switch":
                drawn.append(Fault(at_s, "switch", worker, role=rng.choice(roles)))
                drawn.append(Fault(at_s + for_s, "switch", worker, role=Role.MIXED.value))
            case "drain":
                drawn += [Fault(at_s, "drain", worker), Fault(at_s + for_s, "undrain", worker)]
            case "router":
                drawn.append(Fault(at_s, "kill", rng.choice(routers), restart_s=for_s))
    return sorted(drawn, key=_by_time)
