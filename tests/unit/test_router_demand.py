"""What a router measures of its load follows a shift within seconds, and long answers that go on do not hide what comes now."""

from __future__ import annotations

import pytest

from router.requests.demand import DemandMeter, DemandReport

TOKEN_S = 0.05


def serve(
    meter: DemandMeter, seconds: int, output: int, per_s: int = 4, prompt: int = 1000, at_s: int = 0
) -> list[tuple[float, int]]:
    """Requests of one kind, each token in time. Returns answers that go on: when they began, and their length."""
    running: list[tuple[float, int]] = []
    for tick in range(int(seconds / TOKEN_S)):
        now = at_s + tick * TOKEN_S
        if tick % round(1 / TOKEN_S / per_s) == 0:
            meter.arrived(prompt, now)
            meter.first_token(0.1, now)
            running.append((now, output))
        running = step(meter, running, now)
    return running


def step(meter: DemandMeter, running: list[tuple[float, int]], now: float) -> list[tuple[float, int]]:
    for begun_s, length in running:
        meter.generated(1, begun_s, now)
        if now - begun_s >= length * TOKEN_S:
            meter.ended(length, now - begun_s, now)
    return [(begun_s, length) for begun_s, length in running if now - begun_s < length * TOKEN_S]


def report(meter: DemandMeter, now: float) -> DemandReport:
    return meter.report(0, 0.0, 0, 1.0, now)


def test_the_expected_length_of_answers_is_what_they_have() -> None:
    meter = DemandMeter()
    serve(meter, 60, output=100)
    assert report(meter, 60.0).output_tokens == pytest.approx(100, rel=0.1)


def test_answers_that_have_become_short_are_seen_while_long_ones_go_on() -> None:
    meter = DemandMeter()
    running = serve(meter, 60, output=1500, prompt=300)
    assert len(running) > 200 and report(meter, 60.0).output_tokens > 1000
    for tick in range(int(12 / TOKEN_S)):
        now = 60 + tick * TOKEN_S
        if tick % 5 == 0:
            meter.arrived(9000, now)
            meter.first_token(0.1, now)
            running.append((now, 20))
        running = step(meter, running, now)
    told = report(meter, 72.0)
    assert sum(length == 1500 for _, length in running) > 100
    assert told.output_tokens < 60
    assert min(told.prompt_tokens) == 9000, "prompts of the last seconds alone count where they are enough"


def test_few_requests_are_remembered_for_longer() -> None:
    meter = DemandMeter()
    for at_s in range(0, 30, 3):
        meter.arrived(500, float(at_s))
    assert report(meter, 29.0).prompt_tokens == (500,) * 9
