"""Measures what is asked of one router: arrivals, lengths of prompts and answers, times to tokens. Decides nothing; whoever decides on roles reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

NUM_SECONDS = 64
"""One bucket for each of the last so many seconds."""
SHORT_S, MIDDLE_S, LONG_S = 4, 15, 60
"""Windows of the arrivals that a report tells apart; the trend shows in their relation."""
MAX_SAMPLES = 256
SAMPLE_S = 30.0
"""Older samples of lengths and times are not reported, unless there are none that are newer."""
FRESH_S = 8.0
"""Where so short a time has ENOUGH samples, it alone counts: loads shift."""
ENOUGH = 24
BEGUN_S = 8
"""Answers that began within it tell how long those will be that begin now, if MOST_ENDED of them have ended by now."""
MOST_ENDED = 0.5
NUM_POINTS = 9
"""A distribution is reported as so many points, each the middle of an equal part of it."""


@dataclass(frozen=True, slots=True)
class DemandReport:
    """One moment. Rates a second over the last 4, 15 and 60 s; distributions as NUM_POINTS points, empty: nothing was seen.

    `output_tokens`: of an answer that begins now, as far as those tell that began lately.
    """

    arrivals_per_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    prompt_tokens: tuple[float, ...] = ()
    """Of prompts that came, cached parts included."""
    uncached_share: float = 1.0
    """Of the tokens of prompts, as it was lately."""
    output_tokens: float = 0.0
    tokens_per_s: float = 0.0
    """That clients got, over the last 15 s."""
    finished_per_s: float = 0.0
    """Answers that ended, over the last 15 s."""
    ttft_s: tuple[float, ...] = ()
    tpot_s: tuple[float, ...] = ()
    num_waiting: int = 0
    """Requests in the router's queue."""
    waiting_tokens: float = 0.0
    """Of their prompts, what is not cached as far as that can be told."""
    num_running: int = 0


class _Buckets:
    """Counts by second, for the last NUM_SECONDS."""

    def __init__(self) -> None:
        self._counts = [0.0] * NUM_SECONDS
        self._second = 0
        self._begun_s: int | None = None

    def add(self, count: float, now: float) -> None:
        if now >= self._second + 1:
            self._move(int(now))
        if self._begun_s is None:
            self._begun_s = int(now)
        self._counts[self._second % NUM_SECONDS] += count

    def add_at(self, count: float, at_s: float, now: float) -> None:
        """To the second of an earlier time; nothing if that is too long ago."""
        self._move(int(now))
        if self._second - int(at_s) < NUM_SECONDS:
            self._counts[int(at_s) % NUM_SECONDS] += count

    def total(self, window_s: int, now: float) -> float:
        """Of the last `window_s` seconds."""
        self._move(int(now))
        return sum(self._counts[(self._second - age) % NUM_SECONDS] for age in range(window_s))

    def per_s(self, window_s: int, now: float) -> float:
        """The mean over the window, or over what has passed of it since the first count."""
        if self._begun_s is None:
            return 0.0
        seen_s = max(1.0, min(float(window_s), now - self._begun_s))
        return self.total(window_s, now) / seen_s

    def _move(self, second: int) -> None:
        if second - self._second >= NUM_SECONDS:
            self._counts = [0.0] * NUM_SECONDS
            self._second = second
        while self._second < second:
            self._second += 1
            self._counts[self._second % NUM_SECONDS] = 0.0


class _Recent:
    """The last values of one kind, each with when it came."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))

    def points(self, now: float, keep_old: bool) -> tuple[float, ...]:
        recent = [value for at_s, value in self._values if now - at_s <= FRESH_S]
        if len(recent) < ENOUGH:
            recent = [value for at_s, value in self._values if now - at_s <= SAMPLE_S]
        if not recent and keep_old:
            recent = [value for _, value in self._values]
        return points_of(recent)


def points_of(values: Sequence[float]) -> tuple[float, ...]:
    """The middles of NUM_POINTS equal parts of a distribution; empty when there are no values."""
    if not values:
        return ()
    ordered, count = sorted(values), len(values)
    return tuple(ordered[int((at + 0.5) * count / NUM_POINTS)] for at in range(NUM_POINTS))


class DemandMeter:
    """Of one router. `now` is any clock in seconds that does not go back; the memory is bounded."""

    def __init__(self) -> None:
        self._arrivals, self._tokens, self._ends = _Buckets(), _Buckets(), _Buckets()
        self._begun, self._begun_tokens, self._begun_ends = _Buckets(), _Buckets(), _Buckets()
        """Answers, their tokens and their ends by when they began."""
        self._prompts, self._ttft, self._tpot = _Recent(), _Recent(), _Recent()
        self._output_tokens = 0.0

    def arrived(self, prompt_tokens: int, now: float) -> None:
        """A request was accepted."""
        self._arrivals.add(1.0, now)
        self._prompts.add(prompt_tokens, now)

    def generated(self, num_tokens: int, begun_s: float, now: float) -> None:
        """A client got tokens of an answer that began at `begun_s`."""
        self._tokens.add(num_tokens, now)
        self._begun_tokens.add_at(num_tokens, begun_s, now)

    def first_token(self, ttft_s: float, now: float) -> None:
        self._begun.add(1.0, now)
        self._ttft.add(ttft_s, now)

    def ended(self, num_tokens: int, seconds: float, now: float) -> None:
        """An answer is complete, `seconds` after its first token."""
        self._ends.add(1.0, now)
        self._begun_ends.add_at(1.0, now - seconds, now)
        if num_tokens > 1:
            self._tpot.add(seconds / (num_tokens - 1), now)

    def report(
        self, num_waiting: int, waiting_tokens: float, num_running: int, uncached_share: float, now: float
    ) -> DemandReport:
        """What was measured, with what the router knows of its queue."""
        self._output_tokens = self._expected_output(now)
        return DemandReport(
            tuple(self._arrivals.per_s(window_s, now) for window_s in (SHORT_S, MIDDLE_S, LONG_S)),  # type: ignore[arg-type]
            self._prompts.points(now, keep_old=True),
            uncached_share,
            self._output_tokens,
            self._tokens.per_s(MIDDLE_S, now),
            self._ends.per_s(MIDDLE_S, now),
            self._ttft.points(now, keep_old=False),
            self._tpot.points(now, keep_old=False),
            num_waiting,
            waiting_tokens,
            num_running,
        )

    def _expected_output(self, now: float) -> float:
        """Tokens of an answer that begins now.

        Answers that have not ended are counted with what they have so far: with exponential lengths, all tokens over the number of ends is the
        likeliest mean. Those that began in the last seconds tell of a load that has shifted to short answers. Of long ones few of these have ended,
        which says little of how long they are; then those of the last minute count.
        """
        for window_s in (BEGUN_S, LONG_S):
            num_begun, num_ends = self._begun.total(window_s, now), self._begun_ends.total(window_s, now)
            if window_s == LONG_S or (num_ends >= ENOUGH and num_ends >= MOST_ENDED * num_begun):
                break
        num_tokens = self._begun_tokens.total(window_s, now)
        return num_tokens / max(1.0, num_ends) if num_tokens else self._output_tokens
