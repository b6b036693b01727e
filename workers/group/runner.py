"""The leader's Runner: spreads each batch over the ranks of a group, brings results together, and keeps placement and role.

One engine drives the whole group. A sequence lives in one pool, block ids say in which: pool p has blocks p * N to
(p+1) * N - 1. Every rank takes part in every step, with an empty batch if it has no sequences, so that no rank ever
waits for a group operation that another does not enter.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

from workers.config import WorkerConfig
from workers.errors import DeviceStuck, PoolsLost, RankLost
from workers.group.balance import Balance
from workers.group.epoch_member import EpochMember
from workers.group.leader import OWN_RANK, Callbacks, GroupLeader, Truth
from workers.group.memory import GroupKvMemory, RemotePart
from workers.group.messages import Done, Form, Step
from workers.group.step_codec import BatchWriter, decode_results, split_by_pool
from workers.kv_memory.memory import KvMemory
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import checkpoint_folder
from workers.model.decoder.rank import Rank, group_layout, initial_placement
from workers.model.loading import RankLoader, rank_loader
from workers.model.parallel.collectives import Links
from workers.model.parallel.epoch import start_store
from workers.model.parallel.expert_placement import Placement
from workers.model.parallel.layout import Layout
from workers.runner import Batch, LayerHook, Sampled
from workers.status import ModelInfo, RankStatus

log = logging.getLogger(__name__)

WAIT_S = 0.25
"""A step waits this long for the group to be whole; then the engine looks after its commands and tries again."""
STOP_WAIT_S = 10.0
"""A group that stops waits this long for the step under way, which its abort ends, unless a device holds it."""
_EMPTY = Batch()


class GroupRunner:
    """Implements workers.runner.Runner, and what workers.model.loading.ServedModel needs, for a group of ranks."""

    def __init__(
        self,
        config: WorkerConfig,
        runner: Rank,
        links: Links,
        leader_host: str,
        placement: Placement,
        memory: GroupKvMemory,
    ) -> None:
        self._config, self._parallel = config, config.parallel
        self._member = EpochMember(runner, links, leader_host)
        self._balance = Balance(config.parallel, placement)
        self._memory = memory
        runner.use_memory(memory)
        memory.own = runner if runner.is_staged else None
        self._role, self._generation = "mixed", 0
        self._step_lock = threading.Lock()
        self._truth_lock = threading.Lock()
        self._step_part = threading.RLock()  # held while rank 0 itself joins, computes or leaves
        self._store: object = None
        self._number = 0
        self._writers = [BatchWriter() for _ in range(self.num_pools)]
        self._lost_before: set[int] = set()
        """Pools whose loss came to light in a step that was not the engine's."""
        self._leader: GroupLeader | None = None
        self.warnings = runner.warnings
        self.last_done: dict[int, Done] = {}

    @staticmethod
    def load(
        config: WorkerConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        on_listening: Callable[[tuple[str, int]], None] = lambda address: None,
        on_lost: Callable[[int, str], None] = lambda rank, reason: None,
        loader: RankLoader | None = None,
    ) -> GroupRunner:
        """Starts the leader, tells its address, loads rank 0's part; ranks may come at any time from then on.

        `on_lost(rank, reason)` is called, on some thread, for each rank that is gone: somebody must start another one
        with the same rank and token. Raises InvalidConfig.
        """
        dimensions = ErnieConfig.load(checkpoint_folder(config.model))
        layout = Layout.of(config.parallel, dimensions, OWN_RANK)
        loader = loader or rank_loader(config)
        num_blocks = loader.count_blocks(config)
        placement = initial_placement(config, dimensions)
        links, store = Links(), start_store(host)
        found: list[GroupRunner] = []
        callbacks = Callbacks(
            truth=lambda: found[0].truth if found else Truth(_lists(placement), "mixed", 0),
            form=lambda form: found[0].form(form),
            abort=lambda epoch: found[0].abort(epoch),
            lost=on_lost,
        )
        leader = GroupLeader(config.parallel, callbacks, num_blocks=num_blocks, store=(host, store.port), token=token)
        memory = _share_memory(leader, config, dimensions, layout, num_blocks)
        on_listening(leader.start(host, port))
        runner = loader.load(config, OWN_RANK, links, placement, num_blocks)
        group = GroupRunner(config, runner, links, host, placement, memory)
        group._leader, group._store = leader, store
        found.append(group)
        group._say_ready()
        return group

    # ---- Runner ----

    @property
    def vocab_size(self) -> int:
        return self._member.runner.vocab_size

    @property
    def kv_memory(self) -> KvMemory:
        """All pools with all heads, whatever the ranks' own parts: what a handoff reads and writes."""
        return self._memory

    @property
    def num_pools(self) -> int:
        return self._member.runner.layout.num_pools

    @property
    def model_info(self) -> ModelInfo:
        return self._member.runner.model_info

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._member.runner.eos_token_ids

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        """One step of all ranks. Raises PoolsLost when the batch must run again, later or after a replay.

        `on_layer` is not called: no rank knows how far the others are within a step.
        """
        with self._step_lock:
            if self._balance.is_due(self._number):
                self._look_at_load()
            return self._step(batch)

    # ---- commands ----

    @property
    def leader(self) -> GroupLeader:
        assert self._leader is not None
        return self._leader

    @property
    def member(self) -> EpochMember:
        return self._member

    @property
    def placement(self) -> Placement:
        return self._balance.placement

    @property
    def imbalance_seen(self) -> float:
        """As Balance.imbalance_seen."""
        return self._balance.imbalance_seen

    @property
    def is_serving(self) -> bool:
        return self.leader.is_serving

    @property
    def epoch(self) -> int:
        return self.leader.epoch

    def rank_status(self) -> tuple[RankStatus, ...]:
        """Every rank, the leader first; one that is not connected as it was last seen."""
        leader = self.leader
        epoch = leader.epoch if leader.is_serving else 0
        members, remote = leader.members(), leader.remote_ranks
        found = [RankStatus(OWN_RANK, socket.gethostname(), os.getpid(), epoch, is_alive=True)]
        for rank in range(1, self._parallel.size):
            hello = members.get(rank) or leader.last_seen(rank)
            host, pid = (hello.host, hello.pid) if hello is not None else ("", 0)
            is_alive = rank in members
            found.append(RankStatus(rank, host, pid, epoch if is_alive else 0, is_alive, rank not in remote))
        return tuple(found)

    def remember_role(self, role: str, generation: int) -> None:
        """What the ranks take up when the group forms next; waits for nothing."""
        with self._truth_lock:
            self._role, self._generation = role, generation

    def wait_serving(self, timeout_s: float) -> bool:
        """Whether all ranks are there within that time."""
        return self.leader.wait_serving(timeout_s)

    def switch_role(self, role: str, generation: int, timeout_s: float = 60.0) -> int:
        """All ranks take a role at one step boundary; returns the number of that step. Waits for the step under way.

        A group that breaks meanwhile takes the role when it forms again. Raises RankLost when it does not in time.
        """
        with self._step_lock:
            with self._truth_lock:
                self._role, self._generation = role, generation
            if not self.wait_serving(timeout_s):
                raise RankLost("the group is not whole; its ranks take the role when it is")
            try:
                self._step(_EMPTY)
            except PoolsLost as error:
                self._lost_before |= set(error.pools)
                raise RankLost(str(error)) from error
            return self._number

    def rebalance(self, load: list[list[int]] | None = None) -> int:
        """Plans where experts should be for a load [layer][expert], by default the measured one; returns layers to move.

        The moves ride in the next steps, one layer a step.
        """
        with self._step_lock:
            if load is None:
                self._look_at_load(always=True)
            else:
                self._balance.plan(load)
            return self._balance.num_moves

    def measure_load(self) -> list[list[int]]:
        """Tokens that chose each expert [layer][expert] since the last look, over all ranks. Runs an empty step."""
        with self._step_lock:
            self._step(_EMPTY, wants_load=True)
            return self._balance.load

    def stop(self) -> None:
        """Ends the group: every rank returns from `serve`."""
        self.leader.stop()
        self._member.abort_any()
        if not self._step_lock.acquire(timeout=STOP_WAIT_S):
            log.warning("rank 0 is still in a step %g s after the end of its group", STOP_WAIT_S)
            return
        try:
            self._member.leave()
        except DeviceStuck as error:
            log.warning("rank 0 left its group, but %s", error)
        finally:
            self._step_lock.release()

    # ---- rank 0's own part, called by the leader ----

    @property
    def truth(self) -> Truth:
        with self._truth_lock:
            return Truth(_lists(self._balance.placement), self._role, self._generation)

    def form(self, form: Form) -> None:
        self._member.prepare(form.epoch)
        threading.Thread(target=self._join, args=(form,), name="group-join", daemon=True).start()

    def abort(self, epoch: int) -> None:
        self._member.abort(epoch)
        # a thread of its own: it waits for the step under way, which may want the leader's lock
        threading.Thread(target=self._recover, name="group-recover", daemon=True).start()

    def _join(self, form: Form) -> None:
        with self._step_part:
            try:
                self._member.join(form, self._parallel)
            except RankLost as error:
                message = str(error)
            else:
                message = ""
        if message:
            self.leader.own_broke(form.epoch, message)
        else:
            self.leader.own_formed(form.epoch)

    def _recover(self) -> None:
        with self._step_part:
            self._member.leave()
        self._say_ready()

    def _say_ready(self) -> None:
        runner = self._member.runner
        self.leader.own_ready(runner.model_info.fingerprint, runner.offers_direct, runner.kernels)

    # ---- steps ----

    def _step(self, batch: Batch, wants_load: bool = False) -> list[Sampled]:
        leader = self.leader
        if not leader.wait_serving(WAIT_S):
            raise PoolsLost(self._take_lost_pools(), "the group waits for a rank")
        if lost := self._take_lost_pools():
            raise PoolsLost(lost, "a rank was lost")
        if fault := leader.take_fault():
            raise RuntimeError(fault)
        parts = split_by_pool(batch, self.num_pools, self.kv_memory.layout.num_blocks // self.num_pools)
        epoch = leader.epoch
        self._memory.epoch = epoch
        self._number += 1
        moved_layer, moved_slots = self._balance.next_move
        plan = Step(
            epoch, self._number, self._role, self._generation, self._halves(batch), wants_load, moved_layer,
            list(moved_slots), sum(len(piece.token_ids) for piece in batch.prefill), len(batch.decode),
        )  # fmt: skip
        tensor = self._parallel.tensor_parallel
        tails = [writer.write(epoch, part) for writer, part in zip(self._writers, parts, strict=True)]
        try:
            leader.begin({rank: replace(plan, tail=tails[rank // tensor]) for rank in range(1, self._parallel.size)})
            with self._step_part:
                own, done = self._member.compute(plan, parts[0])
            answers = {OWN_RANK: done, **leader.collect(epoch)}
        except RankLost as error:
            leader.own_broke(epoch, str(error))
            raise PoolsLost((), str(error)) from error
        except Exception as error:
            leader.own_broke(epoch, f"rank 0: {error}")
            raise
        self._finished(answers, moved_layer >= 0, wants_load)
        found = {result.sequence_id: result for result in own}
        for pool in range(1, self.num_pools):
            found |= {result.sequence_id: result for result in decode_results(answers[pool * tensor].tail)}
        return [found[piece.sequence_id] for piece in (*batch.prefill, *batch.decode)]

    def _take_lost_pools(self) -> tuple[int, ...]:
        self._lost_before.update(self.leader.take_lost_pools())
        lost = tuple(sorted(self._lost_before))
        self._lost_before.clear()
        return lost

    def _finished(self, answers: dict[int, Done], has_moved: bool, wants_load: bool) -> None:
        self.last_done = answers
        if has_moved:
            with self._truth_lock:
                self._balance.moved()
        if wants_load:
            self._balance.measured(done.load for done in answers.values())

    def _look_at_load(self, always: bool = False) -> None:
        """Plans moves when the load measured since the last look is uneven."""
        if self._balance.wants_load:
            self._step(_EMPTY, wants_load=True)
            self._balance.look(always)

    def _halves(self, batch: Batch) -> bool:
        least = self._parallel.min_overlap_tokens
        return bool(least) and self._parallel.tensor_parallel == 1 and batch.num_tokens >= least


def _share_memory(
    leader: GroupLeader, config: WorkerConfig, dimensions: ErnieConfig, layout: Layout, num_blocks: int
) -> GroupKvMemory:
    """The memory of the whole group, which ranks on this host are shown and the others are asked for."""

    is_staged = config.device != "cpu"

    def remote_parts() -> list[RemotePart]:
        parts, remote = [], leader.remote_ranks
        for rank in range(1, layout.size) if is_staged else remote:
            its = replace(layout, rank=rank)
            heads = its.share(dimensions.num_kv_heads)
            parts.append(RemotePart(rank, its.pool, heads.first, heads.count, rank not in remote))
        return parts

    memory = GroupKvMemory(group_layout(config, dimensions, layout, num_blocks), num_blocks, remote_parts, leader.ask)
    leader.pool = memory.handle
    return memory


def _lists(placement: Placement) -> list[list[int]]:
    return [list(slots) for slots in placement.layers]
