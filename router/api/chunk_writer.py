"""Writes the chunks of the chat and completions endpoints, a token's from a frame that is prepared once."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from router.api import sse
from router.api.job_progress import Choice, JobProgress
from router.api.problems import Problem
from router.api.shapes import ChunkShape
from router.api.translate import Job
from workers.request import Output


class ChunkWriter:
    """Implements StreamWriter from prepared pieces: only what changes is encoded per output."""

    def __init__(self, job: Job, shape: ChunkShape, progress: JobProgress) -> None:
        self._job = job
        self._shape = shape
        self._progress = progress
        self._head = "data: " + shape.head()
        self._end = (',"usage":null' if job.include_usage else "") + "}\n\n"
        self._has_frames = shape.shows_text_alone and not job.continuous_usage
        self._frames: dict[int, tuple[str, str]] = {}
        """By choice what stands before and after the text of every chunk between its first and its last one."""

    def chunk(self, choice: Choice, output: Output) -> Iterable[str]:
        """One event in parts, to be taken before the next one is asked for; none when the output has nothing to show yet."""
        if choice.is_announced:
            if self._has_frames and output.finish_reason is None:
                if not output.text:
                    return ()
                before, after = self._frames.get(choice.index) or self._frame(choice)
                return (before + sse.text_to_json(output.text) + after,)
            if not (output.text or output.finish_reason or output.logprobs or self._job.return_token_ids):
                return ()
            piece = self._shape.piece(choice, output)
            return (f"{self._head}{piece}]{self._ending()}",) if piece else ()
        if not (output.token_ids or output.finish_reason):
            return ()  # of the prompt only
        first, about = self._shape.first_piece(choice, output), self._shape.extras(choice)
        choice.is_announced = True
        return chain((self._head,), first, ("]",), about, (self._ending(),))

    def _frame(self, choice: Choice) -> tuple[str, str]:
        before, _, after = self._shape.piece(choice, Output("", 0, (), "\0")).partition(sse.to_json("\0"))
        frame = self._frames[choice.index] = f"{self._head}{before}", f"{after}]{self._end}"
        return frame

    def _ending(self) -> str:
        """What follows the choices of a chunk: the same for most of them."""
        job, progress = self._job, self._progress
        is_traced = job.trace and not job.include_usage and not progress.num_unfinished
        if not (job.continuous_usage or is_traced):
            return self._end
        extras = f',"usage":{sse.to_json(progress.usage())}' if job.continuous_usage else ""
        if is_traced:
            extras += f',"baton":{sse.to_json(progress.trace())}'
        return f"{extras}}}\n\n"

    def last_events(self) -> list[str]:
        """With include_usage a chunk without choices comes before the end."""
        if not self._job.include_usage:
            return [sse.DONE.decode()]
        extras = f',"usage":{sse.to_json(self._progress.usage())}'
        if self._job.trace:
            extras += f',"baton":{sse.to_json(self._progress.trace())}'
        return [f"{self._head}]{extras}}}\n\n", sse.DONE.decode()]

    def broken(self, problem: Problem) -> str:
        return (sse.event(problem.body()) + sse.DONE).decode()
