"""The router's end of a stream notices that a worker is not sent what it wrote, and does not mistake its own pause for that."""

from __future__ import annotations

from workers.grpc_client import UNHEARD_S, Heard


def test_a_worker_that_speaks_on_and_does_not_hear_has_lost_a_message() -> None:
    heard = Heard(0.0)
    assert heard.check(1, 2, 0.5) is None
    answers = [heard.check(1, 2, 0.5 + second) for second in range(1, 9)]
    assert answers[: int(UNHEARD_S)] == [None] * int(UNHEARD_S) and answers[-1] == 2


def test_a_worker_that_catches_up_has_lost_nothing() -> None:
    heard = Heard(0.0)
    for second in range(60):
        assert heard.check(second, second + 1, float(second)) is None


def test_frames_that_waited_while_the_router_stood_still_are_old_and_no_loss() -> None:
    heard = Heard(0.0)
    assert heard.check(3, 4, 1.0) is None
    for late in range(3):
        assert heard.check(3, 4, 61.0 + late * 1e-3) is None
    assert heard.check(4, 4, 61.1) is None
