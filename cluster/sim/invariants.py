"""What must hold at every moment of a simulation, and at its end. Looks, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.sim.product import InvariantViolated, RouterConfig
from cluster.sim.router import SimRouter
from cluster.sim.worker import SimWorker


def check_worker(worker: SimWorker) -> None:
    """Blocks are conserved and every bound is held. Raises InvariantViolated."""
    if worker.is_dead:
        return
    name, config, engine = worker.name, worker.config, worker.loop.engine
    engine.check_blocks()
    load = engine.load()
    num_active = load.num_running + load.num_transferring
    if load.num_waiting > config.max_queue + config.max_num_seqs:
        raise InvariantViolated(f"{name} has {load.num_waiting} requests waiting, its bound is {config.max_queue}")
    if num_active > config.max_num_seqs:
        raise InvariantViolated(f"{name} runs {num_active} sequences, its bound is {config.max_num_seqs}")


def check_router(router: SimRouter, config: RouterConfig) -> None:
    """Every bound is held. Raises InvariantViolated."""
    if router.is_dead:
        return
    flights = router.core.flights
    if flights.num_running > config.max_running:
        raise InvariantViolated(f"{router.name} runs {flights.num_running} requests, its bound is {config.max_running}")
    if flights.num_waiting > config.max_queue + config.max_running:
        raise InvariantViolated(
            f"{router.name} has {flights.num_waiting} requests waiting, its bound is {config.max_queue}"
        )
    if len(flights.migrations) > config.max_migrations:
        raise InvariantViolated(
            f"{router.name} moves {len(flights.migrations)} requests, its bound is {config.max_migrations}"
        )


def check_idle(workers: Iterable[SimWorker], routers: Iterable[SimRouter]) -> None:
    """When all requests have ended nothing is held any more. Raises InvariantViolated."""
    for worker in workers:
        if worker.is_dead:
            continue
        check_worker(worker)
        num_held = worker.loop.engine.num_held_blocks
        if num_held or not worker.is_idle:
            raise InvariantViolated(f"{worker.name} holds {num_held} blocks after the last request has ended")
    for router in routers:
        if not router.is_dead and len(router.core.flights):
            raise InvariantViolated(
                f"{router.name} has {len(router.core.flights)} requests after the last one has ended"
            )
