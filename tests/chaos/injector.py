"""The hand that carries a plan of faults out: waits for each fault's step in its request's messages, and strikes once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from chaos.arena import Arena
from chaos.faults import DATA_KINDS, Fault, Kind, Step
from chaos.middle import Passing
from chaos.steps import HandoffWatch

DELAY_S = (0.05, 1.5)
DRAIN_S = 1.0
SLOW_BYTES_PER_S = 4096
SLOW_S = 2.0


def between(bounds: tuple[float, float], chance: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * chance


class Injector:
    """`faults` by request id. `leave(request id)` makes its client hang up. `arena` is set once there is one."""

    def __init__(self, faults: dict[str, Fault], leave: Callable[[str], None]) -> None:
        self._armed = dict(faults)
        self._leave = leave
        self.arena: Arena | None = None
        self.is_running: Callable[[str], bool] = lambda _: True
        """Whether a request has not ended."""
        self.injected: dict[str, Fault] = {}
        self.num_submits: dict[str, int] = {}
        self.num_moves: dict[str, int] = {}
        self.transports: dict[str, list[str]] = {}
        """Transports in the order they were chosen, of the last handoff of each request."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self._data: dict[str, tuple[str, Fault]] = {}
        """Faults of the data path by transfer id, with their request."""

    async def touch(self, passing: Passing) -> list[bytes]:
        name = passing.wire_id.partition("#")[0]
        if passing.step is Step.SUBMIT:
            self.num_submits[name] = self.num_submits.get(name, 0) + 1
        if passing.step is Step.MOVE:
            self.num_moves[name] = self.num_moves.get(name, 0) + 1
        fault = self._armed.get(name)
        if fault is not None and fault.is_move:
            if passing.step is Step.FIRST_TOKEN:
                self._track(self._move(name, passing.decode))
            is_moving = passing.step is Step.MOVE or (passing.handoff is not None and passing.handoff.is_move)
            if not is_moving:
                return [passing.raw]
        elif passing.handoff is not None and passing.handoff.is_move:
            return [passing.raw]
        if fault is not None and fault.kind in DATA_KINDS and passing.step is Step.OPEN:
            await self._arm(fault, passing, name)
        if fault is None or fault.kind in DATA_KINDS or fault.step is not passing.step:
            return [passing.raw]
        del self._armed[name]
        # A strike may end the very stream that this runs in; it is carried out to its end all the same.
        return await asyncio.shield(self._track(self._carry_out(fault, passing, name)))

    async def _move(self, name: str, worker_id: str) -> None:
        """Has the worker drained on which a request runs, as soon as nothing else happens to it."""
        assert self.arena is not None
        while name in self._armed and self.is_running(name):
            if await self.arena.drain(worker_id, DRAIN_S):
                return
            await asyncio.sleep(0.02)

    async def _arm(self, fault: Fault, passing: Passing, name: str) -> None:
        """Has both ends of the transfer spoil a piece once the transfer gets there."""
        assert self.arena is not None and passing.handoff is not None
        watch = passing.handoff
        self._data[watch.transfer_id] = (name, fault)
        last = max(0, watch.num_pieces - 1)
        piece = {Step.FIRST_PIECE: 0, Step.MIDDLE_PIECE: last // 2, Step.LAST_PIECE: last}[fault.step]
        order = {"transfer": watch.transfer_id, "kind": fault.kind, "piece": piece}
        for worker_id in {passing.prefill, passing.decode}:
            with contextlib.suppress(ConnectionError, KeyError):  # it has just been killed
                process = self.arena.process(worker_id)
                if not process.is_stopped:
                    await process.order(do="arm", delay_s=between(DELAY_S, fault.chance), **order)

    def struck(self, transfer_id: str) -> None:
        """A worker has carried a fault of the data path out."""
        name, fault = self._data[transfer_id]
        if self._armed.pop(name, None) is not None:
            self.injected[name] = fault

    async def _carry_out(self, fault: Fault, passing: Passing, name: str) -> list[bytes]:
        out = await self._strike(fault, passing, name)
        if out is not None:
            self.injected[name] = fault
            return out
        if not self._is_closed:
            self._armed[name] = fault  # the worker is in the middle of another fault: another time
        return [passing.raw]

    def _track(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def ended(self, watch: HandoffWatch) -> None:
        if watch.wire_id and not watch.is_move:
            self.transports[watch.wire_id.partition("#")[0]] = list(watch.transports)

    async def close(self) -> None:
        """Strikes no more; waits for what has begun."""
        self._is_closed = True
        self._armed.clear()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _strike(self, fault: Fault, passing: Passing, name: str) -> list[bytes] | None:
        """What is passed on instead of the message; None when the fault could not be carried out now."""
        assert self.arena is not None
        connection, raw, chance = passing.connection, passing.raw, fault.chance
        long_s = self.arena.stale_s * (0.2 + 1.6 * chance)  # sometimes they are given up, sometimes not
        match fault.kind:
            case Kind.DROP:
                return []
            case Kind.DELAY:
                await asyncio.sleep(between(DELAY_S, chance))
            case Kind.DUPLICATE:
                return [raw, raw]
            case Kind.OVERTAKE:
                passing.is_held = True
            case Kind.CUT:
                connection.cut()
            case Kind.HALF_OPEN:
                connection.black_hole()
            case Kind.SLOW:
                connection.throttle(SLOW_BYTES_PER_S, SLOW_S)
            case Kind.LEAVE:
                self._leave(name)
            case Kind.KILL_PREFILL | Kind.KILL_DECODE:
                victim = self._victim(fault, passing)
                if chance < 0.5:  # before the message is passed on, or after
                    return [raw] if await self.arena.kill(victim) else None
                self._later(self.arena.kill(victim), (chance - 0.5) * 0.02)
            case Kind.STOP_PREFILL | Kind.STOP_DECODE:
                return [raw] if self.arena.stop(self._victim(fault, passing), long_s) else None
            case Kind.ZOMBIE_PREFILL | Kind.ZOMBIE_DECODE:
                return [raw] if self.arena.replace_hung(self._victim(fault, passing), chance) else None
            case Kind.SWITCH_PREFILL | Kind.SWITCH_DECODE:
                return [raw] if await self.arena.switch(self._victim(fault, passing), chance) else None
            case _:
                raise ValueError(f"{fault} strikes the data path, not a message")
        return [raw]

    def _victim(self, fault: Fault, passing: Passing) -> str:
        return passing.prefill if fault.kind.endswith("prefill") else passing.decode

    def _later(self, work: Coroutine[Any, Any, Any], delay_s: float) -> None:
        async def run() -> None:
            await asyncio.sleep(delay_s)
            await work

        self._track(run())
