"""Ranks 1 and up: each holds its part of the model and does what the leader says, for one leader after another. Knows no requests."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

from workers.config import WorkerConfig
from workers.errors import BatonError, InvalidConfig, RankLost, TransferFailed
from workers.group.channel import Channel
from workers.group.epoch_member import EpochMember
from workers.group.leader import BEATS_PER_TIMEOUT
from workers.group.memory import put_heads, take_heads
from workers.group.messages import (
    Abort,
    Beat,
    Blocks,
    Declined,
    Failed,
    Form,
    Formed,
    GetBlocks,
    Hello,
    Message,
    PutBlocks,
    Ready,
    Step,
    Stop,
    Welcome,
)  # fmt: skip
from workers.group.step_codec import BatchReader, encode_results
from workers.kv_memory.memory import JoinedKvMemory, KvMemory, SharedHandle
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import checkpoint_folder
from workers.model.decoder.rank import Rank, group_layout, own_layout
from workers.model.loading import RankLoader, rank_loader
from workers.model.parallel.collectives import Links
from workers.model.parallel.expert_placement import Placement

log = logging.getLogger(__name__)


class Follower:
    """One rank of a group, in a process of its own. Weights and KV outlive epochs and leaders."""

    def __init__(
        self,
        config: WorkerConfig,
        rank: int,
        token: str,
        on_loaded: Callable[[], None] = lambda: None,
        loader: RankLoader | None = None,
    ) -> None:
        """`on_loaded` is called on the thread that serves, each time this rank is ready for an epoch."""
        self._config, self._rank, self._token, self._loader = config, rank, token, loader
        self._on_loaded = on_loaded
        self._shares_memory = False
        self._num_blocks = 0
        self._links = Links()
        self._member: EpochMember | None = None
        self._reader = BatchReader()
        self._channel: Channel | None = None

    @property
    def member(self) -> EpochMember | None:
        """What this rank holds, once it is loaded."""
        return self._member

    def serve(self, host: str, port: int) -> str:
        """Works for the leader there until the leader stops the group or is lost; returns why it ended.

        Can be called again, with a new leader's address: what is loaded stays. Raises InvalidConfig when the leader
        declines this rank, or its part of the model cannot be loaded.
        """
        timeout_s = self._config.parallel.heartbeat_timeout_s
        try:
            channel = Channel.connect(host, port, timeout_s, self._token)
        except RankLost as error:
            return str(error)
        self._channel = channel
        ended = threading.Event()
        inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        try:
            fingerprint = "" if self._member is None else self._member.runner.model_info.fingerprint
            size = self._config.parallel.size
            channel.send(Hello(self._rank, size, os.getpid(), socket.gethostname(), fingerprint))
            for target, arguments in ((self._receive, (channel, inbox)), (self._beat, (channel, ended))):
                threading.Thread(target=target, args=arguments, name="group", daemon=True).start()
            while (message := inbox.get()) is not None:
                if isinstance(message, Stop):
                    return "the group was stopped"
                self._handle(message, channel)
            return "the leader is lost"
        except RankLost as error:
            return str(error)
        finally:
            ended.set()
            channel.close()
            if self._member is not None:
                self._member.abort_any()
                self._member.leave()

    def stop(self) -> None:
        """Ends `serve`, from another thread."""
        if self._channel is not None:
            self._channel.close()

    def _receive(self, channel: Channel, inbox: queue.SimpleQueue[Message | None]) -> None:
        """Passes messages on; an abort, and the leader's loss, act at once, whatever this rank is waiting for."""
        try:
            while True:
                message = channel.receive()
                member = self._member
                match message:
                    case Beat():
                        continue
                    case Abort():
                        if member is not None:
                            member.abort(message.epoch)
                    case Form():
                        if member is not None:
                            member.prepare(message.epoch)
                    case _:
                        pass
                inbox.put(message)
        except RankLost as error:
            log.info("rank %d: %s", self._rank, error)
            if self._member is not None:
                self._member.abort_any()
            inbox.put(None)

    def _beat(self, channel: Channel, ended: threading.Event) -> None:
        interval_s = self._config.parallel.heartbeat_timeout_s / BEATS_PER_TIMEOUT
        try:
            while not ended.wait(interval_s):
                channel.send(Beat())
        except RankLost:
            return

    def _handle(self, message: Message, channel: Channel) -> None:
        match message:
            case Welcome():
                self._load(message, channel.own_host)
                self._say_ready(channel)
            case Declined():
                raise InvalidConfig(f"the leader declined rank {self._rank}: {message.message}")
            case Form():
                self._form(message, channel)
            case Abort():
                # whatever this rank did in that epoch has ended by now: messages are handled one after another
                if self._member is not None:
                    self._member.leave()
                    self._say_ready(channel)
            case Step():
                self._step(message, channel)
            case GetBlocks() | PutBlocks():
                assert self._member is not None
                if message.epoch == self._member.epoch:  # otherwise the leader has given up waiting
                    channel.send(self._move_blocks(message))
            case _:
                pass

    def _load(self, welcome: Welcome, host: str) -> None:
        size = self._config.parallel.size
        if self._member is None:
            placement = Placement(size, tuple(map(tuple, welcome.slots)))
            loader = self._loader or rank_loader(self._config)
            runner = loader.load(self._config, self._rank, self._links, placement, welcome.num_blocks)
            self._member = EpochMember(runner, self._links, host)
        else:
            self._member.runner.resize(welcome.num_blocks)
        self._num_blocks = welcome.num_blocks
        self._join_memory(self._member.runner, welcome)

    def _join_memory(self, runner: Rank, welcome: Welcome) -> None:
        """The leader's memory where it can be reached, which is on its host; else one of this rank's own."""
        dimensions = ErnieConfig.load(checkpoint_folder(self._config.model))
        whole = group_layout(self._config, dimensions, runner.layout, welcome.num_blocks)
        nonce = bytes.fromhex(welcome.pool_nonce)
        handle = SharedHandle(welcome.pool_pid, welcome.pool_fd, welcome.pool_bytes, nonce)
        try:
            if "shm" not in self._config.transports:
                raise TransferFailed("worker.transports does not have shm")
            runner.use_memory(JoinedKvMemory(handle, whole), runner.layout.pool * welcome.num_blocks)
        except TransferFailed as error:
            log.info("rank %d keeps its KV to itself: %s", self._rank, error)
            own = own_layout(self._config, dimensions, runner.layout, welcome.num_blocks)
            runner.use_memory(KvMemory(own))
            self._shares_memory = False
        else:
            self._shares_memory = True

    def _say_ready(self, channel: Channel) -> None:
        assert self._member is not None
        runner = self._member.runner
        fingerprint, experts = runner.model_info.fingerprint, runner.experts
        ready = Ready(fingerprint, experts.expert_bytes, self._shares_memory, runner.offers_direct, runner.kernels)
        channel.send(ready)
        self._on_loaded()

    def _move_blocks(self, message: GetBlocks | PutBlocks) -> Blocks:
        assert self._member is not None
        runner, memory = self._member.runner, self._member.runner.kv_memory
        heads = memory.layout.num_kv_heads
        if not all(0 <= block < self._num_blocks for block in message.blocks):
            raise RankLost("the leader named a block that this rank does not have")
        if isinstance(message, GetBlocks):
            runner.show_blocks(message.blocks)
            tail = b"" if self._shares_memory else take_heads(memory, message.blocks, 0, heads)
            return Blocks(message.number, tail)
        if not self._shares_memory:
            put_heads(memory, message.blocks, 0, heads, message.tail)
        runner.take_blocks(message.blocks)
        return Blocks(message.number)

    def _form(self, form: Form, channel: Channel) -> None:
        assert self._member is not None
        try:
            self._member.join(form, self._config.parallel)
        except RankLost as error:
            channel.send(Failed(form.epoch, str(error), is_broken=True))
        else:
            channel.send(Formed(form.epoch))

    def _step(self, step: Step, channel: Channel) -> None:
        assert self._member is not None
        try:
            results, done = self._member.compute(step, self._reader.read(step.epoch, step.tail))
        except RankLost as error:
            channel.send(Failed(step.epoch, str(error), is_broken=True))
        except (BatonError, ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            log.exception("rank %d failed in step %d", self._rank, step.number)
            channel.send(Failed(step.epoch, f"{type(error).__name__}: {error}", is_broken=False))
        else:
            is_head = self._member.runner.layout.is_pool_head
            channel.send(replace(done, tail=encode_results(results)) if is_head else done)
