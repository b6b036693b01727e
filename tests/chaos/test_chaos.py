"""A short slice of `make chaos`: the same arenas with few requests."""

from __future__ import annotations

import pytest

from chaos.faults import Kind
from chaos.run import Result
from chaos.scenarios import moves, prompts, routers

QUICK = (Kind.DROP, Kind.DUPLICATE, Kind.OVERTAKE, Kind.CUT, Kind.LEAVE)
"""Faults that cost no waiting for a bound."""
DATA = (Kind.DATA_DROP, Kind.DATA_DUPLICATE, Kind.DATA_CORRUPT, Kind.DATA_CUT, Kind.DATA_UNREACHABLE)


def troubles(result: Result) -> list[str]:
    """What is not as it should be: answers other than the golden run's, and what was left behind."""
    wrong = [f"{o.request_id} ({o.planned}): {o.trouble}" for o in result.outcomes if o.trouble]
    return wrong + result.leaks


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_faults_at_every_step_change_no_token_and_leave_nothing(transport: str) -> None:
    result = await prompts(3, transport, 40, (*QUICK, *DATA), num_each=2).run()
    assert troubles(result) == []
    assert sum(outcome.injected for outcome in result.outcomes) >= 10


async def test_killed_workers_change_no_token_and_leave_nothing() -> None:
    result = await prompts(4, "grpc", 16, (Kind.KILL_PREFILL, Kind.KILL_DECODE), num_each=2).run()
    assert troubles(result) == []
    assert result.num_killed > 0


async def test_faults_in_migrations_change_no_token_and_leave_nothing() -> None:
    result = await moves(5, "shm", 8, (Kind.DROP, Kind.CUT, Kind.DATA_CORRUPT)).run()
    assert troubles(result) == []
    assert result.num_drained > 0


async def test_routers_killed_under_clients_that_resume_change_no_token_and_leave_nothing() -> None:
    result = await routers(1, 12).run()
    assert troubles(result) == []
    assert any(o.injected and o.planned is not None and o.planned.kind is Kind.KILL_ROUTER for o in result.outcomes)
