"""Which transports two workers share, and in which order they try them."""

from __future__ import annotations

from workers.config import BEST_FIRST, SAME_HOST
from workers.handoff.protocol.choices import negotiate

ALL = dict.fromkeys(BEST_FIRST, b"offer")


def test_the_receivers_order_decides() -> None:
    assert negotiate(("grpc", "shm", "tcp"), ALL, "a", "a") == ("grpc", "shm", "tcp")


def test_only_what_was_offered_is_tried() -> None:
    assert negotiate(BEST_FIRST, {"grpc": b"", "tcp": b"1"}, "a", "a") == ("tcp", "grpc")
    assert negotiate(BEST_FIRST, {}, "a", "a") == ()


def test_memory_is_not_shared_between_hosts() -> None:
    usable = negotiate(BEST_FIRST, ALL, "a", "b")
    assert not SAME_HOST & set(usable)
    assert set(usable) | SAME_HOST == set(BEST_FIRST)


def test_unknown_and_repeated_names_are_passed_over() -> None:
    offers = ALL | {"pigeon": b"coo"}
    assert negotiate(("pigeon", "tcp", "grpc", "tcp"), offers, "a", "b") == ("tcp", "grpc")
