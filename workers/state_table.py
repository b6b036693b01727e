"""State machines as tables: which event leads from which state where, and what is done then. Knows no machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from workers.errors import InvariantViolated

S = TypeVar("S", bound=Enum)


@dataclass(frozen=True, slots=True)
class Rule(Generic[S]):
    """In each of `states` each of `events` leads to the state `to` (None: it stays), and `action` is done.

    An event is a member of an enum, or the class of the values that are such events. An action is a method of the machine, or a
    member of an enum that says what the machine's owner has to do; None: nothing.
    """

    states: tuple[S, ...]
    events: tuple[object, ...]
    to: S | None
    action: Any = None


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """What one event does to a machine in one state."""

    to: S
    action: Any


class StateTable(Generic[S]):
    """All rules of one machine. Raises InvariantViolated, when it is made, for two rules for one event in one state."""

    def __init__(self, name: str, rules: Iterable[Rule[S]]) -> None:
        self.name = name
        self.rules = tuple(rules)
        self._steps: dict[tuple[S, object], Step[S]] = {}
        for rule in self.rules:
            for state in rule.states:
                for event in rule.events:
                    if (state, event) in self._steps:
                        raise InvariantViolated(f"{name}: two rules for {_named(event)} in {state.name}")
                    self._steps[state, event] = Step(state if rule.to is None else rule.to, rule.action)
        self._leaves = frozenset(state for (state, _), step in self._steps.items() if step.to is not state)

    def find(self, state: S, event: object) -> Step[S] | None:
        """None: the table has no rule for it."""
        return self._steps.get((state, event))

    def step(self, state: S, event: object) -> Step[S]:
        """Raises InvariantViolated when the table has no rule for it; asking changes nothing."""
        step = self._steps.get((state, event))
        if step is None:
            raise InvariantViolated(f"{self.name}: {_named(event)} must not happen in {state.name}")
        return step

    def is_final(self, state: S) -> bool:
        """No event leads on from here."""
        return state not in self._leaves

    def render(self) -> str:
        """The rules as a table in Markdown."""
        lines = ["| in | when | then | and |", "|---|---|---|---|"]
        for rule in self.rules:
            states = ", ".join(state.name for state in rule.states)
            events = ", ".join(map(_named, rule.events))
            to = "stays" if rule.to is None else rule.to.name
            lines.append(f"| {states} | {events} | {to} | {_described(rule.action)} |")
        return "\n".join(lines)


def _named(event: object) -> str:
    return event.name if isinstance(event, Enum) else str(getattr(event, "__name__", event))


def _described(action: object) -> str:
    """The first sentence of what its docstring says, or what the member says."""
    if action is None:
        return ""
    if isinstance(action, Enum):
        return str(action.value)
    text = " ".join((action.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".")
