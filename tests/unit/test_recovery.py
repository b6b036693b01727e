"""How a handoff goes on after a fault depends on the time that is left and on what has been measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.handoff.protocol.choices import Measured, Recovery, RecoveryChoice, Situation, choose

MEASURED = Measured(bandwidth=100.0, own_rate=10.0, source_rates={"prefill-1": 20.0})
FAULT = Situation(
    remaining_s=60.0,
    missing_bytes=200,
    total_bytes=1000,
    num_tokens=100,
    can_resend=True,
    current="prefill-0",
    others=("prefill-1",),
)
"""To send again takes 2 s, another source 5 + 10 s, to compute here 10 s."""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, RecoveryChoice(Recovery.NEXT_TRANSPORT, 2.0, True)),
        ({"can_resend": False}, RecoveryChoice(Recovery.NEXT_SOURCE, 15.0, True)),
        ({"can_resend": False, "others": ()}, RecoveryChoice(Recovery.LOCAL, 10.0, True)),
        ({"can_resend": False, "remaining_s": 12.0}, RecoveryChoice(Recovery.LOCAL, 10.0, True)),
        ({"source_left_s": 30.0, "remaining_s": 20.0}, RecoveryChoice(Recovery.NEXT_SOURCE, 15.0, True)),
        ({"source_left_s": 30.0, "remaining_s": 12.0}, RecoveryChoice(Recovery.LOCAL, 10.0, True)),
        ({"remaining_s": 1.0}, RecoveryChoice(Recovery.NEXT_TRANSPORT, 2.0, False)),
        ({"remaining_s": 1.0, "missing_bytes": 100_000}, RecoveryChoice(Recovery.LOCAL, 10.0, False)),
        ({"remaining_s": -3.0, "can_resend": False}, RecoveryChoice(Recovery.LOCAL, 10.0, False)),
    ],
)
def test_the_first_way_that_fits_is_taken_else_the_fastest(change: dict[str, object], expected: RecoveryChoice) -> None:
    assert choose(replace(FAULT, **change), MEASURED) == expected  # type: ignore[arg-type]


def test_what_was_never_measured_is_given_a_chance() -> None:
    assert choose(replace(FAULT, can_resend=False, remaining_s=1.0), Measured()).recovery is Recovery.NEXT_SOURCE
    unknown = Measured(bandwidth=100.0, own_rate=10.0)
    assert choose(replace(FAULT, can_resend=False, remaining_s=12.0), unknown) == RecoveryChoice(
        Recovery.NEXT_SOURCE, 10.0, True
    )


def test_measurements_are_smoothed_and_bounded() -> None:
    measured = Measured(max_sources=2)
    measured.landed("a", 100, 1.0, 50, 1.0)
    assert (measured.bandwidth, measured.source_rates) == (100.0, {"a": 50.0})
    measured.landed("a", 200, 1.0, 50, 0.5)
    assert measured.bandwidth == pytest.approx(130.0) and measured.source_rates["a"] == pytest.approx(65.0)
    measured.landed("b", 0, 0.0, 10, 1.0)
    measured.landed("c", 0, 0.0, 10, 1.0)
    assert set(measured.source_rates) == {"b", "c"} and measured.bandwidth == pytest.approx(130.0)


@given(
    st.floats(-10, 100), st.integers(0, 10**6), st.integers(1, 10**5), st.booleans(), st.booleans(), st.floats(0, 50)
)
def test_the_way_taken_is_open_and_none_preferred_to_it_would_have_fitted(
    remaining_s: float, missing: int, tokens: int, can_resend: bool, has_other: bool, left_s: float
) -> None:
    others = ("prefill-1",) if has_other else ()
    fault = Situation(remaining_s, missing, 10**6, tokens, can_resend, "prefill-0", others, left_s)
    choice = choose(fault, MEASURED)
    assert choice.recovery is not Recovery.NEXT_TRANSPORT or can_resend
    assert choice.recovery is not Recovery.NEXT_SOURCE or has_other
    assert choice.fits == (choice.expected_s <= remaining_s)
