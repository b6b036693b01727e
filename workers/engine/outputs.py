"""What a client hears of one sequence: turns drawn and replayed tokens into Outputs, each token once; knows no batch and no blocks."""

from __future__ import annotations

from dataclasses import replace

from workers.prompt_scores import PromptScores
from workers.request import MAX_SCORES, HandoffReport, Output
from workers.runner import Sampled
from workers.scheduler.sequence import Sequence
from workers.text.output import OutputState


class Answer:
    """Reads its sequence and changes nothing in it. Times are the engine's clock, in seconds."""

    def __init__(self, sequence: Sequence, text: OutputState, worker_id: str, arrived_s: float) -> None:
        self._sequence = sequence
        self._text = text
        self._worker_id = worker_id
        self._num_texted = 0
        """Tokens that `text` has seen; a replay after a preemption does not show them again."""
        self._has_spoken = False
        self._num_scored = 1
        """Prompt tokens whose logprobs have been said; the first has none. A replay does not say them again."""
        self._report: HandoffReport | None = None
        self._landed_cached_tokens = 0
        self._queue_s: float | None = None
        """From its arrival until it had blocks."""
        self._computed_from_s = arrived_s
        """When this worker began to compute a prompt that did not come from elsewhere."""

    def admitted(self, now: float) -> None:
        """It has blocks; what comes after the first time is a preemption's business."""
        if self._queue_s is None:
            self._queue_s = max(0.0, now - self._computed_from_s)
            self._computed_from_s = now

    def landed(self, report: HandoffReport, cached_tokens: int) -> None:
        """Its prompt was computed by another worker, which had so many of its tokens in a cache."""
        self._report = report
        self._landed_cached_tokens = cached_tokens

    def computed_here(self, report: HandoffReport, now: float) -> None:
        """No other worker could compute its prompt; this one begins to."""
        self._report = report
        self._computed_from_s = now

    def take_up(self, token_ids: tuple[int, ...]) -> None:
        """The client heard the beginning from another worker: brings text and stop strings to where these tokens lead."""
        for token_id in token_ids[self._num_texted :]:
            self._text.push(token_id)
        self._num_texted = len(token_ids)
        self._has_spoken = True

    def scored(self, scores: PromptScores) -> list[Output]:
        """What is to be said when a chunk of the prompt has been computed: its logprobs, unless the client has them."""
        request = self._sequence.request
        if request.replay_token_ids:
            return []
        outputs = []
        for start in range(max(self._num_scored, scores.first), scores.end, MAX_SCORES):
            part = scores.part(start, start + MAX_SCORES)
            outputs.append(Output(request.request_id, 0, prompt_logprobs=(part,)))
            self._num_scored = part.end
        return outputs

    def push(self, position: int, sampled: Sampled, is_new: bool, now: float) -> Output | None:
        """Accounts for the token at output position `position`, which is replayed unless it is new.

        None when the client has it. An output with a finish reason ends the sequence.
        """
        assert sampled.token_id is not None
        if position < self._num_texted:
            return None
        self._num_texted += 1
        progress = self._text.push(sampled.token_id)
        num_given = len(self._sequence.request.replay_token_ids)
        if position < num_given and progress.finish_reason is None:
            return None
        output = Output(
            request_id=self._sequence.request.request_id,
            position=position if is_new else num_given,
            token_ids=(sampled.token_id,) if is_new else (),
            text=progress.text,
            logprobs=(sampled.logprob,) if sampled.logprob is not None and is_new else (),
            finish_reason=progress.finish_reason,
            stop_reason=progress.stop_reason,
        )
        if not self._has_spoken:
            self._has_spoken = True
            output = self._first(output, now)
        return output

    @property
    def can_run(self) -> int:
        """So many tokens may be told as one output, with no look at each; none before the first token has been said."""
        is_replaying = self._num_texted < self._sequence.num_drawn or not self._has_spoken
        return 0 if is_replaying or self._sequence.request.params.logprobs is not None else self._text.can_run

    def push_run(self, position: int, token_ids: tuple[int, ...]) -> Output:
        """As `push`, for new tokens from `position` on, at most `can_run`."""
        self._num_texted += len(token_ids)
        return Output(self._sequence.request.request_id, position, token_ids, self._text.push_run(token_ids))

    def _first(self, output: Output, now: float) -> Output:
        """Adds what is said once: cached tokens, and how the prompt was computed."""
        sequence, report = self._sequence, self._report
        if report is None or report.transport == "local":
            report = report or HandoffReport(self._worker_id, self._worker_id, "local")
            report = replace(report, prefill_s=now - self._computed_from_s)
        return output._replace(
            cached_tokens=max(sequence.num_cached_tokens, self._landed_cached_tokens),
            handoff=replace(report, queue_s=self._queue_s or 0.0),
        )
