"""When a request is given up: after faults in a row, and after a cluster has been busy for too long."""

from __future__ import annotations

from router.requests.in_flight import RetryHistory, RetryPolicy
from workers.errors import Refusal

POLICY = RetryPolicy(max_attempts=5, patience_s=60.0)


def test_a_cluster_that_refuses_for_too_long_is_given_up() -> None:
    history = RetryHistory()
    assert all(history.setback(Refusal.QUEUE_FULL, POLICY, float(now)) is not None for now in range(0, 61, 10))
    assert history.setback(Refusal.QUEUE_FULL, POLICY, 61.0) is None


def test_the_time_that_an_attempt_ran_before_its_worker_was_lost_is_no_time_of_refusals() -> None:
    history = RetryHistory()
    assert history.setback(Refusal.STALE_GENERATION, POLICY, 0.0) is not None
    assert history.setback(Refusal.WORKER_LOST, POLICY, 70.0) is not None  # it ran for 70 s
    assert history.setback(Refusal.STALE_GENERATION, POLICY, 70.1) is not None
    assert history.setback(Refusal.STALE_GENERATION, POLICY, 130.2) is None
