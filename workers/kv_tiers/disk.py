"""Reads and writes a BlockFolder on a thread of its own, so that nobody waits for a disk; decides nothing but the order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.kv_cache.block_hash import BlockKey
from workers.kv_tiers.folder import BadRecord, BlockFolder, Scanned

log = logging.getLogger(__name__)

MAX_READ_RESULTS = 16
"""Blocks read and not yet taken; the thread waits when there are so many."""


@dataclass(frozen=True, slots=True)
class _Write:
    key: BlockKey
    payload: npt.NDArray[np.uint8]
    checksum: int


@dataclass(frozen=True, slots=True)
class _Delete:
    block_hash: int


@dataclass(frozen=True, slots=True)
class Written:
    block_hash: int


@dataclass(frozen=True, slots=True)
class DiskFailed:
    """The disk does not take more, or is gone: the tier is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class ReadBlock:
    """`payload` None: the file was not what it should be, for this reason."""

    key: BlockKey
    payload: npt.NDArray[np.uint8] | None
    reason: str = ""


Result = Written | DiskFailed | ReadBlock | Scanned


class DiskThread:
    """Reads go first; writes and deletions keep their order; what an earlier process left is looked through beside them. At most
    `max_writes` writes wait, each with a block of memory.

    `on_result` is called on the thread after each result. One caller's thread uses everything else.
    """

    def __init__(self, folder: BlockFolder, max_writes: int) -> None:
        self._folder = folder
        self._max_writes = max_writes
        self._reads: deque[BlockKey] = deque()
        self._changes: deque[_Write | _Delete] = deque()
        self._num_writes = 0
        self._results: deque[Result] = deque()
        self._num_read = 0
        self._scan: Iterator[Scanned | None] | None = folder.scan()
        """None when it has ended."""
        self._is_busy = False
        self._is_stopping = False
        self._moved = threading.Condition()
        self.on_result: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="kv-disk", daemon=True)
        self._thread.start()

    @property
    def can_write(self) -> bool:
        return self._num_writes < self._max_writes

    def write(self, key: BlockKey, payload: npt.NDArray[np.uint8], checksum: int) -> None:
        """Only when `can_write`; answered by Written or DiskFailed. The payload must not change any more."""
        with self._moved:
            self._num_writes += 1
            self._changes.append(_Write(key, payload, checksum))
            self._moved.notify_all()

    def delete(self, block_hash: int) -> None:
        with self._moved:
            self._changes.append(_Delete(block_hash))
            self._moved.notify_all()

    def read(self, key: BlockKey) -> None:
        """Answered by ReadBlock."""
        with self._moved:
            self._reads.append(key)
            self._moved.notify_all()

    def take(self) -> list[Result]:
        """All results so far."""
        with self._moved:
            results = list(self._results)
            self._results.clear()
            self._num_read = 0
            if results:
                self._moved.notify_all()
            return results

    def wait(self, timeout_s: float) -> None:
        """Returns when there is a result, or nothing is under way, or the time is over."""
        with self._moved:
            self._moved.wait_for(lambda: self._results or not self._has_work, timeout_s)

    def wait_scanned(self, timeout_s: float) -> None:
        """Returns when all that an earlier process left is among the results, or after so long."""
        with self._moved:
            self._moved.wait_for(lambda: self._scan is None, timeout_s)

    @property
    def is_idle(self) -> bool:
        """Nothing is under way and every result has been taken."""
        with self._moved:
            return not (self._has_work or self._results)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Lets the thread finish the job under way, drop the others and close the folder; waits for it so long."""
        with self._moved:
            self._is_stopping = True
            self._moved.notify_all()
        self._thread.join(timeout_s)

    @property
    def _has_work(self) -> bool:
        return bool(self._is_busy or self._reads or self._changes or self._scan is not None)

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whoever waits for this thread must not wait for ever
            log.exception("the thread of the KV disk tier ends")
            with self._moved:
                self._is_busy, self._scan = False, None
                self._reads.clear()
                self._changes.clear()
                self._results.append(DiskFailed(repr(error)))
                self._moved.notify_all()
        finally:
            self._folder.close()

    def _work(self) -> None:
        while True:
            with self._moved:
                self._is_busy = False
                self._moved.notify_all()
                self._moved.wait_for(
                    lambda: self._is_stopping or self._next_queue() is not None or self._scan is not None
                )
                if self._is_stopping:
                    return
                jobs = self._next_queue()
                job = None if jobs is None else jobs.popleft()
                self._is_busy = True
            result = self._look_on() if job is None else self._do(job)
            with self._moved:
                if isinstance(job, _Write):
                    self._num_writes -= 1
                if result is not None:
                    self._results.append(result)
                    self._num_read += isinstance(result, ReadBlock)
            if result is not None:
                self.on_result()

    def _look_on(self) -> Scanned | None:
        assert self._scan is not None
        try:
            return next(self._scan)
        except StopIteration:
            pass
        except Exception:
            log.exception("what an earlier process left in the KV disk tier is not used")
        with self._moved:
            self._scan = None
        return None

    def _next_queue(self) -> deque[BlockKey] | deque[_Write | _Delete] | None:
        if self._reads and self._num_read < MAX_READ_RESULTS:
            return self._reads
        return self._changes or None

    def _do(self, job: BlockKey | _Write | _Delete) -> Result | None:
        match job:
            case BlockKey():
                try:
                    return ReadBlock(job, self._folder.read(job))
                except (OSError, BadRecord) as error:
                    return ReadBlock(job, None, str(error))
                except Exception as error:
                    log.exception("block %016x cannot be read", job.block_hash)
                    return ReadBlock(job, None, repr(error))
            case _Write(key, payload, checksum):
                try:
                    self._folder.write(key, payload, checksum)
                except OSError as error:
                    return DiskFailed(error.strerror or str(error))
                except Exception as error:
                    log.exception("block %016x cannot be written", key.block_hash)
                    return DiskFailed(repr(error))
                return Written(key.block_hash)
            case _Delete(block_hash):
                try:
                    self._folder.delete(block_hash)
                except Exception:
                    log.exception("block %016x cannot be deleted", block_hash)
        return None
