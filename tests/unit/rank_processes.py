"""Starts the ranks of a group as processes of this machine, and replaces them when they are lost."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import signal
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from workers.config import WorkerConfig
from workers.group.runner import GroupRunner
from workers.model.loading import RankLoader, rank_loader

TOKEN = "a group of tests"
WAIT_S = 60.0


def loader_of(config: WorkerConfig, rank: int) -> RankLoader:
    """Where there is no GPU, ranks that are configured for one compute on the CPU, in Triton's interpreter; and what they
    exchange without the host goes through an emulation of NVSHMEM."""
    import torch

    if config.device == "cpu":
        return rank_loader(config)
    import tests.unit.interpreted_products  # noqa: F401
    from tests.unit.symmetric_emulation import emulated
    from workers.model.cuda.rank_runner import CudaRanks

    if torch.cuda.is_available():
        return CudaRanks(torch.device("cuda", rank))
    return CudaRanks(torch.device("cpu"), emulated)


def serve_ranks(pipe: Connection) -> None:
    """The life of a rank process: one rank after another, and of each one leader after another."""
    import torch

    from workers.group.follower import Follower

    faulthandler.enable()
    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        config, rank, addresses = task
        follower = Follower(config, rank, TOKEN, loader=loader_of(config, rank))
        for address in addresses:
            why = follower.serve(*address)
            member = follower.member
            facts = None if member is None else (member.role, member.generation)
            pipe.send((why, facts, id(member)))


@dataclass
class RankProcess:
    """A process, and the end of the pipe that tells it what to do."""

    process: Any
    pipe: Connection

    @staticmethod
    def spawn() -> RankProcess:
        context = mp.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve_ranks, args=(there,), daemon=True)
        process.start()
        there.close()
        return RankProcess(process, here)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def outcome(self) -> tuple[str, tuple[str, int] | None, int]:
        """Why a rank's service ended, and what role it had."""
        assert self.pipe.poll(WAIT_S), "the rank does not end"
        found: tuple[str, tuple[str, int] | None, int] = self.pipe.recv()
        return found


@dataclass
class RankPool:
    """Processes that wait for a rank to be; starting one takes seconds."""

    idle: list[RankProcess] = field(default_factory=list)

    def take(self) -> RankProcess:
        return self.idle.pop() if self.idle else RankProcess.spawn()

    def give_back(self, process: RankProcess) -> None:
        self.idle.append(process)

    def close(self) -> None:
        for process in self.idle:
            process.pipe.send(None)
        for process in self.idle:
            process.process.join(WAIT_S)


@dataclass
class Group:
    """A group whose rank 0 is this process. Lost ranks are killed, as a supervisor does, and started anew when told to."""

    pool: RankPool
    config: WorkerConfig
    runner: GroupRunner = field(init=False)
    ranks: dict[int, RankProcess] = field(default_factory=dict)
    lost: list[tuple[int, str]] = field(default_factory=list)
    address: tuple[str, int] = field(init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        for rank in range(1, self.config.parallel.size):
            self.ranks[rank] = self.pool.take()
        self.runner = GroupRunner.load(
            self.config,
            token=TOKEN,
            on_listening=self._listening,
            on_lost=self._on_lost,
            loader=loader_of(self.config, 0),
        )
        assert self.runner.wait_serving(WAIT_S), "the group does not form"

    def replace(self, rank: int) -> None:
        """What a supervisor does: makes sure that the old process is gone, and starts another one."""
        self.ranks[rank].process.kill()
        self.ranks[rank].process.join(WAIT_S)
        self.ranks[rank] = self.pool.take()
        self._start(rank)

    def wait_whole(self) -> None:
        """Until all ranks serve. Says who was lost and how its process ended, where they never do."""
        if not self.runner.wait_serving(WAIT_S):
            ended = {rank: process.process.exitcode for rank, process in self.ranks.items()}
            raise AssertionError(f"the group is not whole: lost {self.lost}, exit codes {ended}")

    def wait_lost(self, count: int = 1) -> list[tuple[int, str]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.lost) >= count, WAIT_S), "no rank was found lost"
            return self.lost

    def stop(self) -> dict[int, tuple[str, int] | None]:
        """The role of each rank at the end."""
        self.runner.stop()
        facts = {}
        for rank, process in self.ranks.items():
            _, facts[rank], _ = process.outcome()
            self.pool.give_back(process)
        return facts

    def _listening(self, address: tuple[str, int]) -> None:
        self.address = address
        for rank in self.ranks:
            self._start(rank)

    def _start(self, rank: int) -> None:
        self.ranks[rank].pipe.send((self.config, rank, [self.address]))

    def _on_lost(self, rank: int, reason: str) -> None:
        with self._changed:
            self.lost.append((rank, reason))
            self._changed.notify_all()


KILL, HANG = signal.SIGKILL, signal.SIGSTOP
