"""The loop around one engine in virtual time: what workers.engine.thread does on a thread. Decides nothing, but how many steps go at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

from cluster.sim.model import BytelessMemory, EngineClock, TimedRunner, ends_of_run, make_detokenizer
from cluster.sim.product import (
    STALL_CHECK_S,
    Engine,
    EngineCommand,
    LayersFilled,
    Limits,
    Report,
    Sequence,
    WorkerConfig,
    carry_out,
    report_of,
)
from cluster.sim.profiles.profile import Profile
from cluster.sim.timeline import Timeline, Timer
from cluster.sim.tokens import draw_run


class StepUnderWay(NamedTuple):
    """One of many steps that are under way, as a report of it would say; `number` is its own."""

    number: tuple[int, int]
    num_decodes: int
    context: int
    """Tokens whose KV it read."""
    seconds: float


class _Leap:
    """Many steps under way; nothing is done before they end, or until somebody has something to say to the engine."""

    __slots__ = ("begun_s", "context", "decoding", "ends", "number", "timer")

    def __init__(self, number: int, begun_s: float, decoding: list[Sequence], ends: list[float], timer: Timer) -> None:
        self.number = number
        self.begun_s = begun_s
        self.decoding = decoding
        self.ends = ends
        self.timer = timer
        self.context = sum([sequence.num_computed for sequence in decoding])
        """Tokens whose KV the first of the steps reads."""


class EngineLoop:
    """`on_report` and `on_layers` hear at the times at which a real engine's owner would.

    `leap_until(now)` says until when nothing happens that must see each step by itself; steps that only decode are taken
    together up to there, and up to `max_leap_s`. 0: never. `hang_ups` says by seed after which token a client leaves, which must
    hear of it at once.
    """

    def __init__(
        self,
        profile: Profile,
        config: WorkerConfig,
        memory: BytelessMemory,
        worker_id: str,
        timeline: Timeline,
        on_report: Callable[[Report], None],
        on_layers: Callable[[LayersFilled], None],
        max_leap_s: float,
        leap_until: Callable[[float], float],
        hang_ups: Mapping[int, int],
    ) -> None:
        self._timeline = timeline
        self._on_report = on_report
        self._on_layers = on_layers
        self._max_leap_s = max_leap_s
        self._leap_until = leap_until
        self._hang_ups = hang_ups
        self._clock = EngineClock(timeline.clock)
        self.runner = TimedRunner(profile, memory, self._clock)
        limits = Limits(
            config.max_num_seqs,
            config.max_batch_tokens,
            config.max_queue,
            config.local_prefill_tokens,
            config.max_prefill_pause_s,
        )
        self.engine = Engine(
            self.runner,
            limits,
            make_detokenizer=make_detokenizer,
            eos_token_ids=(),
            max_model_len=profile.max_model_len,
            prefix_cache=config.prefix_cache,
            worker_id=worker_id,
            overlap_steps=False,
            clock=self._clock,
        )
        self.engine.outgoing.on_layers = self._tell_layers
        self._content = memory.content
        self._content.sequence_of = self.engine.sequence
        self._commands: list[EngineCommand] = []
        self._is_turn_due = False
        self._is_stepping = False
        self._leap: _Leap | None = None
        self._num_leaps = 0
        self._stall: Timer | None = None
        self._is_stopped = False

    def post(self, command: EngineCommand) -> None:
        """It takes effect between two steps."""
        self._commands.append(command)
        if self._leap is not None:
            self._cut_short(self._leap)
        elif not self._is_stepping:
            self._wake()

    def stop(self) -> None:
        """For good, and at once: what a step under way would bring is lost."""
        self._is_stopped = True

    @property
    def is_quiet(self) -> bool:
        """No step runs and nothing waits for one."""
        return not (self._is_stepping or self._commands or self.engine.has_work)

    def catch_up(self) -> None:
        """Of many steps under way those that have ended are told of now, and the one that runs ends by itself."""
        if self._leap is not None:
            self._cut_short(self._leap)

    def _wake(self) -> None:
        if not self._is_turn_due:
            self._is_turn_due = True
            self._timeline.soon(self._turn)

    def _turn(self) -> None:
        """One round of the engine thread: commands, then what is to be said early, then a step."""
        self._is_turn_due = False
        if self._is_stopped or self._is_stepping:
            return
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        engine, clock = self.engine, self._clock
        may_leap = not self._commands  # what commands have changed is told with the next step
        if may_leap and not engine.has_work:
            return
        if self._commands:
            commands, self._commands = self._commands, []
            for command in commands:
                carry_out(engine, command)
        early = engine.take_early()
        if early is not None:
            self._timeline.soon(self._report, report_of(engine, early))
        if may_leap and early is None and self._max_leap_s and self._begin_leap():
            return
        clock.ahead_s = 0.0
        result = engine.step()
        took_s, clock.ahead_s = clock.ahead_s, 0.0
        self._is_stepping = True
        report = report_of(engine, result)
        if took_s:
            self._timeline.after(took_s, self._stepped, report)
        else:
            self._timeline.soon(self._stepped, report)

    def _stepped(self, report: Report) -> None:
        """A step has ended. The thread goes on with the next one before anybody has heard of this one."""
        self._is_stepping = False
        if self._is_stopped:
            return
        if self._commands or (self.engine.has_work and not self.engine.made_no_progress):
            self._turn()
        elif self.engine.has_work:
            self._stall = self._timeline.after(STALL_CHECK_S, self._wake)
        self._report(report)

    def _report(self, report: Report) -> None:
        if not self._is_stopped:
            self._on_report(report)

    def _tell_layers(self, layers: LayersFilled) -> None:
        self._timeline.after(self._clock.ahead_s, self._say_layers, layers)

    def _say_layers(self, layers: LayersFilled) -> None:
        if not self._is_stopped:
            self._on_layers(layers)

    # ---- many steps at once ----

    def step_before(self, at_s: float) -> StepUnderWay | None:
        """Of many steps under way the last one that had ended by then. Single steps are reported one by one, and whoever learns from
        them takes the last one."""
        leap = self._leap
        num_done = 0 if leap is None else bisect_right(leap.ends, at_s)
        if leap is None or not num_done:
            return None
        before_s = leap.ends[num_done - 2] if num_done > 1 else leap.begun_s
        count = len(leap.decoding)
        return StepUnderWay(
            (leap.number, num_done), count, leap.context + (num_done - 1) * count, leap.ends[num_done - 1] - before_s
        )

    def _begin_leap(self) -> bool:
        now = self._timeline.now
        until_s = min(now + self._max_leap_s, self._leap_until(now))
        if until_s <= now:
            return False
        decoding, num_steps = self.engine.leapers()
        if self._hang_ups:
            for sequence in decoding:
                leaves_after = self._hang_ups.get(sequence.request.params.seed or 0)
                if leaves_after is not None and leaves_after > sequence.num_drawn:
                    num_steps = min(num_steps, leaves_after - sequence.num_drawn)
        if num_steps < 2:
            return False
        ends = ends_of_run(self.runner, [sequence.num_computed for sequence in decoding], num_steps, now, until_s)
        reads_own = self._content.reads_own
        if len(ends) < 2 or not all([reads_own(sequence, sequence.num_computed, len(ends)) for sequence in decoding]):
            return False
        self._is_stepping = True
        self._num_leaps += 1
        self._leap = _Leap(self._num_leaps, now, decoding, ends, self._timeline.at(ends[-1], self._end_leap))
        return True

    def _cut_short(self, leap: _Leap) -> None:
        """The step that runs now is the last one."""
        num_done = bisect_right(leap.ends, self._timeline.now)
        if num_done + 1 < len(leap.ends):
            del leap.ends[num_done + 1 :]
            leap.timer.cancel()
            leap.timer = self._timeline.at(leap.ends[-1], self._end_leap)

    def _end_leap(self) -> None:
        leap, self._leap = self._leap, None
        assert leap is not None
        if self._is_stopped:
            return
        ends = leap.ends
        steps_s = [end_s - begun_s for begun_s, end_s in pairwise([leap.begun_s, *ends])]
        result = self.engine.leap(leap.decoding, steps_s, draw_run)
        for sequence in leap.decoding:
            self._content.decoded_run(sequence, len(ends))
        self.runner.num_steps += len(ends)
        self.runner.busy_s += ends[-1] - leap.begun_s
        self._stepped(report_of(self.engine, result))
