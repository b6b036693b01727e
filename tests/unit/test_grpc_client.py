"""The router's end of a stream does not mistake its own pause for a worker that hears nothing."""

from __future__ import annotations

from workers.wire.grpc_client import Heard


def test_a_worker_that_catches_up_has_lost_nothing() -> None:
    heard = Heard()
    assert all(heard.check(second, second + 1, float(second)) for second in range(60))


def test_frames_that_waited_while_the_router_stood_still_are_old_and_no_loss() -> None:
    heard = Heard()
    assert heard.check(3, 4, 1.0)
    assert all(heard.check(3, 4, 61.0 + late * 1e-3) for late in range(3))
    assert heard.check(4, 4, 61.1)
