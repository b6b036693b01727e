"""The loop around one core of the product in virtual time: events go in one after the other, and what the core says is carried out in between. Decides nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from cluster.sim.timeline import Timeline

Event = TypeVar("Event")
Command = TypeVar("Command")
EventIn = TypeVar("EventIn", contravariant=True)
CommandOut = TypeVar("CommandOut", covariant=True)


class Core(Protocol[EventIn, CommandOut]):
    """A pure core of the product."""

    def handle(self, event: EventIn, now: float, /) -> Iterable[CommandOut]: ...


class CoreLoop(ABC, Generic[Event, Command]):
    """From the start of a process to its end; `is_dead`: it hears nothing any more."""

    core: Core[Event, Command]

    def __init__(self, timeline: Timeline) -> None:
        self.is_dead = False
        self._timeline = timeline
        self._events: deque[Event] = deque()
        self._is_handling = False

    def handle(self, event: Event) -> None:
        """Takes an event now, or right behind the one that is being handled."""
        if self.is_dead:
            return
        events = self._events
        events.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        core, now = self.core, self._timeline.now
        while events:
            for command in core.handle(events.popleft(), now):
                self._execute(command)
        self._is_handling = False
        self._rest()

    @abstractmethod
    def _execute(self, command: Command) -> None:
        """Carries a command out; what happens by it at once may be added to `_events`."""

    def _rest(self) -> None:
        """Nothing is left to be said to the core for now."""
