"""Waits for Ray's actors: until they are ready, while they load, until they have stopped. Creates none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from cluster.console.output import StepPrinter, loading_text
from cluster.steps import StartFailed
from workers.status import LoadProgress

LOOK_EVERY_S = 2.0
"""How often workers that load are asked how far they have come."""


async def wait_ready(actors: dict[str, Any], timeout_s: float) -> None:
    """Waits for all; the first failure ends it and names the actor. Raises InvalidConfig, ActorFailed, StartFailed."""
    waiting = {asyncio.ensure_future(_ready(name, actor)): name for name, actor in actors.items()}
    try:
        async with asyncio.timeout(timeout_s):
            for done in asyncio.as_completed(waiting):
                await done
    except TimeoutError:
        late = ", ".join(sorted(name for task, name in waiting.items() if not task.done()))
        raise StartFailed(
            f"{late} did not start within {timeout_s:g} s; is the machine too busy? (start_timeout_s sets the limit)"
        ) from None
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@asynccontextmanager
async def watched(workers: Mapping[str, Any], progress: StepPrinter) -> AsyncIterator[None]:
    """Says in the meantime how far the workers have come with their checkpoint."""

    async def ask(name: str, actor: Any, into: dict[str, LoadProgress]) -> None:
        with suppress(Exception):  # what is wrong with an actor, whoever waits for it hears
            found = await actor.loading.options(enable_task_events=False).remote()  # no news for Ray's timeline
            if found.num_bytes_read < found.num_bytes:
                into[name] = found

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            coming: dict[str, LoadProgress] = {}
            asking = [asyncio.ensure_future(ask(name, actor, coming)) for name, actor in workers.items()]
            try:
                await asyncio.wait(asking, timeout=LOOK_EVERY_S)
            finally:
                for each in asking:
                    each.cancel()
            if coming:
                progress.note(loading_text(coming))

    watching = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _ready(name: str, actor: Any) -> None:
    from cluster.ray_session.failures import told  # needs Ray, whose import would hold up the preflight

    with told(name):
        await actor.ready.remote()


async def leave(actor: Any, name: str, timeout_s: float, progress: StepPrinter) -> None:
    """Lets a worker's requests move to others before it goes; a router has none to move."""
    if not hasattr(actor, "leave"):
        return
    with suppress(Exception), progress.step(f"moving requests away from {name}"):
        async with asyncio.timeout(timeout_s + 1.0):
            if not await actor.leave.remote():
                progress.say(f"{name} still has requests; they are run again elsewhere")


async def stop_actors(actors: list[Any], timeout_s: float) -> None:
    """Asks the actors to stop, all at once, and waits at most `timeout_s` for them."""
    if actors:
        stops = [asyncio.ensure_future(_stop(actor)) for actor in actors]
        _, late = await asyncio.wait(stops, timeout=timeout_s)
        for task in late:
            task.cancel()


async def _stop(actor: Any) -> None:
    with suppress(Exception):  # an actor that is gone needs no stop
        await actor.stop.remote()


def remove_actors(actors: list[Any]) -> None:
    """Ends the actors' processes for good."""
    import ray

    for actor in actors:
        with suppress(Exception):
            ray.kill(actor, no_restart=True)


async def ask_head(work: Callable[[], object], timeout_s: float) -> bool:
    """Runs what waits for Ray's head in a thread that nothing else waits for: a head that is gone would hold it for minutes.

    False when that took longer than `timeout_s`. What the work raises is not for who ends.
    """
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run() -> None:
        with suppress(Exception):
            work()
        with suppress(RuntimeError):  # the loop may have ended meanwhile
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="ask-head", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            await done.wait()
    except TimeoutError:
        return False
    return True
