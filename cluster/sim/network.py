"""The simulated network: messages that take their time and keep their order, KV that shares a link, and cuts between nodes. Knows nothing of what is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.sim.timeline import Timeline, Timer

Call = Callable[..., None]


class Pipe:
    """One direction of one stream between two nodes: messages arrive in order. One that is lost is noticed when the next arrives, and
    ends the stream (`on_damage`), as workers.wire.streams has it."""

    __slots__ = ("_is_damaged", "_last_s", "_network", "is_closed", "on_damage", "source", "target")

    def __init__(self, network: Network, source: str, target: str, on_damage: Call) -> None:
        self._network = network
        self._last_s = 0.0
        self._is_damaged = False
        self.is_closed = False
        self.source = source
        self.target = target
        self.on_damage = on_damage

    def send(self, latency_s: float, call: Call, *args: Any) -> None:
        """`call(*args)` at the other end, unless the pipe is closed by then."""
        network = self._network
        if network.is_calm:
            network.timeline.after(latency_s, self._arrive, call, args)
        else:
            self._send_in_trouble(latency_s, call, args)

    def _send_in_trouble(self, latency_s: float, call: Call, args: tuple[Any, ...]) -> None:
        network = self._network
        if network.loses(self.source, self.target):
            self._is_damaged = True
            network.num_lost += 1
            return
        at_s = network.timeline.now + latency_s + network.lateness_s(self.source, self.target)
        self._last_s = at_s = max(self._last_s, at_s)
        network.timeline.at(at_s, self._arrive, call, args)

    def _arrive(self, call: Call, args: tuple[Any, ...]) -> None:
        if self.is_closed:
            return
        if not self._network.is_calm and self._network.hold(self.source, self.target, self._arrive, call, args):
            return
        if self._is_damaged:
            self.is_closed = True
            self.on_damage("a message of the stream was lost")
            return
        call(*args)


class Flow:
    """KV bytes on their way from one node to another."""

    __slots__ = ("left_bytes", "on_arrival", "on_loss", "rate", "since_s", "source", "target", "timer")

    def __init__(self, source: str, target: str, num_bytes: int, on_arrival: Call, on_loss: Call) -> None:
        self.source = source
        self.target = target
        self.left_bytes = float(num_bytes)
        self.rate = 0.0
        self.since_s = 0.0
        self.timer: Timer | None = None
        self.on_arrival = on_arrival
        self.on_loss = on_loss


class Network:
    """Each node has one link; `bytes_per_s` go out over it and as many come in. Flows that share a link's direction have equal parts,
    and a flow goes as fast as the slower of its two parts."""

    def __init__(self, timeline: Timeline, bytes_per_s: float, latency_s: float) -> None:
        self.timeline = timeline
        self.is_calm = True
        """Nothing is cut, late or lost anywhere now; messages that were late may still be on their way."""
        self.num_lost = 0
        self.num_flows = 0
        self.moved_bytes = 0.0
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._out: dict[str, dict[Flow, None]] = {}
        self._in: dict[str, dict[Flow, None]] = {}
        self._cuts: dict[int, tuple[frozenset[str], frozenset[str] | None]] = {}
        self._late: dict[int, tuple[frozenset[str], float]] = {}
        self._lossy: dict[int, tuple[frozenset[str], Callable[[], bool]]] = {}
        self._num_troubles = 0
        self._held: list[tuple[str, str, Call, Call, tuple[Any, ...]]] = []

    # ---- troubles ----

    def cut(self, nodes: frozenset[str], others: frozenset[str] | None = None) -> int:
        """Nothing passes between `nodes` and the others, None: all others, until `mend(number)`. Messages wait, flows stand still."""
        number = self._begin()
        self._cuts[number] = (nodes, others)
        self._reflow_all()
        return number

    def delay(self, nodes: frozenset[str], seconds: float) -> int:
        """What goes to or from these nodes comes so much later."""
        number = self._begin()
        self._late[number] = (nodes, seconds)
        return number

    def drop(self, nodes: frozenset[str], draw: Callable[[], bool]) -> int:
        """Of what goes to or from these nodes those messages are lost for which `draw()` says so."""
        number = self._begin()
        self._lossy[number] = (nodes, draw)
        return number

    def mend(self, number: int) -> None:
        """The trouble is over."""
        self._cuts.pop(number, None)
        self._late.pop(number, None)
        self._lossy.pop(number, None)
        held, self._held = self._held, []
        for _, _, arrive, call, args in held:
            self.timeline.soon(arrive, call, args)
        self._reflow_all()

    def _begin(self) -> int:
        self.is_calm = False  # pipes remember from here on what is on its way
        self._num_troubles += 1
        return self._num_troubles

    def is_cut(self, source: str, target: str) -> bool:
        for nodes, others in self._cuts.values():
            if (source in nodes) != (target in nodes):
                other = target if source in nodes else source
                if others is None or other in others:
                    return True
        return False

    def hold(self, source: str, target: str, arrive: Call, call: Call, args: tuple[Any, ...]) -> bool:
        """Keeps a message that cannot pass until a trouble is mended."""
        if not self.is_cut(source, target):
            return False
        self._held.append((source, target, arrive, call, args))
        return True

    def lateness_s(self, source: str, target: str) -> float:
        return sum(seconds for nodes, seconds in self._late.values() if source in nodes or target in nodes)

    def loses(self, source: str, target: str) -> bool:
        return any((source in nodes or target in nodes) and draw() for nodes, draw in self._lossy.values())

    # ---- KV ----

    def move(self, source: str, target: str, num_bytes: int, on_arrival: Call, on_loss: Call) -> Flow:
        """Begins to move bytes; one of the two is called, once, when they have arrived or never will."""
        flow = Flow(source, target, num_bytes, on_arrival, on_loss)
        self._out.setdefault(source, {})[flow] = None
        self._in.setdefault(target, {})[flow] = None
        self.num_flows += 1
        flow.since_s = self.timeline.now
        self._reflow(source, target)
        return flow

    def lose_node(self, node: str) -> None:
        """Whatever is on its way to or from it never arrives."""
        for flow in [*self._out.get(node, {}), *self._in.get(node, {})]:
            if flow.timer is not None:
                flow.timer.cancel()
            self._remove(flow)
            self.timeline.soon(flow.on_loss)

    def _remove(self, flow: Flow) -> None:
        self._out[flow.source].pop(flow, None)
        self._in[flow.target].pop(flow, None)
        self.num_flows -= 1
        self._reflow(flow.source, flow.target)

    def _reflow(self, source: str, target: str) -> None:
        """Flows that share one of these links get their parts."""
        flows = self._out.get(source, {}) | self._in.get(target, {})
        for flow in flows:
            self._set_rate(flow)

    def _reflow_all(self) -> None:
        for flows in list(self._out.values()):
            for flow in flows:
                self._set_rate(flow)

    def _set_rate(self, flow: Flow) -> None:
        now = self.timeline.now
        num_sharing = max(len(self._out[flow.source]), len(self._in[flow.target]))
        rate = self._bytes_per_s / num_sharing
        if self._cuts and self.is_cut(flow.source, flow.target):
            rate = 0.0
        if flow.timer is not None and rate == flow.rate:
            return
        flow.left_bytes -= flow.rate * (now - flow.since_s)
        flow.since_s, flow.rate = now, rate
        if flow.timer is not None:
            flow.timer.cancel()
            flow.timer = None
        if rate:
            flow.timer = self.timeline.after(max(0.0, flow.left_bytes) / rate, self._end, flow)

    def _end(self, flow: Flow) -> None:
        self.moved_bytes += flow.left_bytes
        self._remove(flow)
        self.timeline.after(self._latency_s, flow.on_arrival)
