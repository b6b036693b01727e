"""Real workers with real gRPC between them: a running sequence moves, under load and through every fault, without a changed token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from builders import FakeModel, generate_alone, make_request
from running_workers import CONFIG, Attached, running, tokens

from workers.config import WorkerConfig
from workers.errors import Refusal
from workers.handoff.protocol.messages import SequenceMoved
from workers.handoff.protocol.source_session import HandoffBroken as SourceBroken
from workers.handoff.protocol.source_session import SourceSession
from workers.handoff.protocol.target_session import HandoffLost as TargetBroken
from workers.handoff.protocol.target_session import TargetSession
from workers.request import FinishReason, Output, Request
from workers.runner import Batch, Runner, Sampled
from workers.status import Role
from workers.trust.permits import make_permit
from workers.wire.attach import Cancel, Migration, Submit
from workers.worker import Worker


class Paused:
    """A runner that decodes only while it is let: `allow(n)` lets n more steps happen."""

    def __init__(self, runner: Runner) -> None:
        import threading

        self._runner = runner
        self._steps = threading.Semaphore(0)
        self._free = False

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def kv_memory(self):  # type: ignore[no-untyped-def]
        return self._runner.kv_memory

    @property
    def num_pools(self) -> int:
        return self._runner.num_pools

    def allow(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._steps.release()

    def run_free(self) -> None:
        self._free = True
        self._steps.release()

    def execute(self, batch: Batch) -> list[Sampled]:
        if batch.decode and not self._free:
            self._steps.acquire()
        return self._runner.execute(batch)


class PausedModel(FakeModel):
    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self.paused = Paused(self.runner)
        self.runner = self.paused


@dataclass
class Two:
    """Two decode workers and a router at each; `pace` holds the first one's steps."""

    source: Worker
    target: Worker
    at_source: Attached
    at_target: Attached
    pace: Paused

    async def start(self, request: Request, num_tokens: int) -> None:
        await self.at_source.submit(request)
        self.pace.allow(num_tokens - 1)
        await self.at_source.until(lambda: len(self.sent(request)) >= num_tokens)

    def sent(self, request: Request) -> list[int]:
        return tokens([o for o in self.at_source.outputs if o.request_id == request.request_id])

    async def move(self, request: Request, name: str = "moved") -> None:
        again = replace(request, request_id=name, replay_token_ids=tuple(self.sent(request)))
        migration = self.permitted(request.request_id)
        await self.at_target.send(Submit(again, self.at_target.address.generation, migration=migration))

    def permitted(self, name: str) -> Migration:
        """As a router without a secret writes it for the target."""
        return Migration(self.at_source.address, name, make_permit(b"", self.at_target.address.worker_id))

    async def moved(self, request: Request, name: str = "moved") -> list[int]:
        """All tokens of a request that has moved, checked for gaps and repeats."""
        marker = (await self.at_source.finish(request.request_id))[-1]
        assert marker.finish_reason is FinishReason.MOVED, marker
        arrived = await self.at_target.finish(name)
        assert arrived[0].position == marker.position == len(self.sent(request))
        return self.sent(request) + tokens(arrived)

    async def idle(self) -> None:
        await self.at_source.idle()
        await self.at_target.idle()


@asynccontextmanager
async def two(config: WorkerConfig = CONFIG) -> AsyncIterator[Two]:
    models: list[PausedModel] = []

    def load(config: WorkerConfig) -> PausedModel:
        models.append(PausedModel(config))
        return models[-1]

    source = Worker(config, "decode-0", 1, Role.MIXED, load=load)
    address = await source.start()
    try:
        async with running("decode-1", Role.DECODE, config) as (target, other):
            at_source, at_target = await Attached(address).start(), await Attached(other).start()
            try:
                yield Two(source, target, at_source, at_target, models[0].paused)
            finally:
                models[0].paused.run_free()
                await at_source.close()
                await at_target.close()
    finally:
        models[0].paused.run_free()
        await source.stop()


async def keep_going(pair: Two, condition: Callable[[], bool]) -> None:
    """Lets the source take one step at a time until something has happened."""
    async with asyncio.timeout(30):
        while not condition():
            pair.pace.allow(1)
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize(("num_prompt", "num_tokens"), [(5, 1), (200, 70), (900, 30)])
async def test_a_running_sequence_moves_without_a_changed_token(
    transport: str, num_prompt: int, num_tokens: int
) -> None:
    config = replace(CONFIG, transports=(transport,))
    request = make_request([7 + i % 900 for i in range(num_prompt)], 400, temperature=1.0, seed=9, logprobs=0)
    async with two(config) as pair:
        await pair.start(request, num_tokens)
        await pair.move(request)
        await keep_going(pair, lambda: any(o.finish_reason for o in pair.at_source.outputs))
        assert await pair.moved(request) == generate_alone(request, 64, max_model_len=4096)
        assert all(len(o.logprobs) == len(o.token_ids) for o in pair.at_target.outputs)
        await pair.idle()
        counters = dict(pair.target.status().counters)
        assert counters["migrations_in"] == 1 and counters["migrated_bytes"] > 0


async def test_many_sequences_move_under_load() -> None:
    requests = [
        make_request([i + 5] * (i * 40 + 1), 600, request_id=f"r{i}", temperature=1.0, seed=i) for i in range(10)
    ]
    async with running("a", Role.MIXED) as (_, address), running("b", Role.MIXED) as (_, other):
        source, target = await Attached(address).start(), await Attached(other).start()
        for request in requests:
            await source.submit(request)
        for request in requests:
            name = request.request_id
            await source.until(lambda name=name: any(o.request_id == name for o in source.outputs))
            sent = tokens([o for o in source.outputs if o.request_id == name])
            again = replace(request, request_id=f"m-{name}", replay_token_ids=tuple(sent))
            migration = Migration(address, name, make_permit(b"", "b"))
            await target.send(Submit(again, other.generation, migration=migration))
        num_moved = 0
        for request in requests:
            first = await source.finish(request.request_id)
            got = tokens(first)
            if first[-1].finish_reason is FinishReason.MOVED:
                num_moved += 1
                got += tokens(await target.finish(f"m-{request.request_id}"))
            assert got == generate_alone(request, 64, max_model_len=4096)
        assert num_moved > 0
        await source.idle()
        await target.idle()
        await source.close()
        await target.close()


async def refused(pair: Two, name: str = "moved") -> Output:
    return (await pair.at_target.finish(name))[-1]


async def test_what_cannot_be_moved_is_refused_and_goes_on() -> None:
    request = make_request(range(5, 105), 60)
    async with two() as pair:
        await pair.start(request, 5)
        await pair.move(replace(request, request_id="nobody"), "moved-0")
        assert (await refused(pair, "moved-0")).refusal is Refusal.NOT_MOVABLE
        strange = replace(request, request_id="strange", replay_token_ids=(1, 2, 3))
        migration = pair.permitted("r")
        await pair.at_target.send(Submit(strange, pair.at_target.address.generation, migration=migration))
        await keep_going(pair, lambda: any(o.request_id == "strange" for o in pair.at_target.outputs))
        assert (await refused(pair, "strange")).refusal is Refusal.NOT_MOVABLE


async def test_a_sequence_goes_on_when_its_target_dies_in_the_middle() -> None:
    request = make_request(range(5, 305), 120)
    async with two() as pair:
        await pair.start(request, 5)
        await pair.move(request)
        await pair.target.stop()
        pair.pace.run_free()
        outputs = await pair.at_source.finish("r")
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert tokens(outputs) == generate_alone(request)
        await pair.at_source.idle()


async def test_a_source_that_dies_before_the_state_has_moved_makes_the_target_refuse() -> None:
    request = make_request(range(5, 305), 120)
    async with two() as pair:
        await pair.start(request, 5)
        await pair.move(request)
        stopping = asyncio.create_task(pair.source.stop())
        pair.pace.run_free()
        await stopping
        output = await refused(pair)
        assert output.finish_reason in (FinishReason.ERROR, FinishReason.LENGTH)
        if output.finish_reason is FinishReason.ERROR:
            assert output.refusal is Refusal.NOT_MOVABLE
        await pair.at_target.idle()


def has_ended(router: Attached, name: str) -> bool:
    return any(o.request_id == name and o.finish_reason for o in router.outputs)


@pytest.mark.parametrize("end", [SourceSession, TargetSession])
async def test_a_transfer_that_breaks_at_any_step_changes_no_token(end: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence after another, each cut one event later than the last: some stay, the last ones have moved by then."""
    handle, broken = end.handle, SourceBroken if end is SourceSession else TargetBroken
    left = [0]

    def cut(self, event, now):  # type: ignore[no-untyped-def]
        left[0] -= 1
        first = handle(self, broken("cut"), now) if left[0] == 0 else []
        return first + handle(self, event, now)

    outcomes = []
    async with two() as pair:
        monkeypatch.setattr(end, "handle", cut)
        for step in range(1, 16):
            left[0] = step
            request = make_request([step + 5] * 200, 100, request_id=f"r{step}")
            await pair.start(request, 3)
            await pair.move(request, f"m{step}")
            await keep_going(pair, lambda n=request.request_id: has_ended(pair.at_source, n))
            last = (await pair.at_source.finish(request.request_id))[-1]
            outcomes.append(last.finish_reason)
            arrived = await pair.at_target.finish(f"m{step}")
            if last.finish_reason is FinishReason.MOVED:
                assert pair.sent(request) + tokens(arrived) == generate_alone(request)
            else:  # both may have run on, if the cut hid from the source that the target had landed
                assert pair.sent(request) == generate_alone(request)
                golden = generate_alone(request)
                assert all(golden[o.position : o.position + len(o.token_ids)] == list(o.token_ids) for o in arrived)
        await pair.idle()
    assert {FinishReason.LENGTH, FinishReason.MOVED} <= set(outcomes)


async def test_a_cancel_at_any_moment_frees_both() -> None:
    async with two() as pair:
        pair.pace.run_free()
        for index in range(20):
            request = make_request([index + 5] * 500, 2000, request_id=f"c{index}")
            await pair.at_source.submit(request)
            await pair.at_source.until(lambda i=index: any(o.request_id == f"c{i}" for o in pair.at_source.outputs))
            await pair.move(request, f"m{index}")
            for _ in range(index * 3):
                await asyncio.sleep(0)
            if index % 2:
                await pair.at_target.until(lambda i=index: any(o.request_id == f"m{i}" for o in pair.at_target.outputs))
            await pair.at_source.send(Cancel(f"c{index}"))
            await pair.at_target.send(Cancel(f"m{index}"))
        await pair.idle()


async def test_a_target_that_does_not_land_in_time_loses_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = TargetSession.handle

    def never_done(self, event, now):  # type: ignore[no-untyped-def]
        return [] if isinstance(event, SequenceMoved) else handle(self, event, now)

    monkeypatch.setattr(TargetSession, "handle", never_done)
    request = make_request(range(5, 305), 60)
    async with two(replace(CONFIG, max_pause_s=0.2)) as pair:
        await pair.start(request, 5)
        await pair.move(request)
        pair.pace.run_free()
        assert tokens(await pair.at_source.finish("r")) == generate_alone(request)
        assert (await refused(pair)).refusal is Refusal.NOT_MOVABLE
        await pair.idle()


async def test_a_draining_worker_refuses_new_work_by_name_and_gives_up_what_it_has() -> None:
    request = make_request(range(5, 205), 100)
    async with two() as pair:
        await pair.start(request, 5)
        status = pair.source.set_draining(True)
        assert status.is_draining
        await pair.at_source.until(lambda: pair.at_source.status is not None and pair.at_source.status.is_draining)
        late = make_request(range(5), 4, request_id="late")
        await pair.at_source.submit(late)
        assert (await pair.at_source.finish("late"))[0].refusal is Refusal.DRAINING
        await pair.at_target.submit(make_request(range(5, 205), 4, request_id="prompt"), pair.at_source.address)
        computed = (await pair.at_target.finish("prompt"))[0]
        assert computed.handoff is not None and computed.handoff.transport == "local"
        await pair.move(request)
        await keep_going(pair, lambda: any(o.finish_reason is FinishReason.MOVED for o in pair.at_source.outputs))
        assert await pair.moved(request) == generate_alone(request)
        assert await pair.source.leave()
        pair.source.set_draining(False)
        await pair.at_source.submit(replace(late, request_id="again"))
        pair.pace.run_free()
        assert len(tokens(await pair.at_source.finish("again"))) == 4


async def test_a_worker_that_leaves_waits_no_longer_than_it_may() -> None:
    request = make_request(range(5, 205), 100)
    async with two(replace(CONFIG, drain_timeout_s=0.1)) as pair:
        await pair.start(request, 5)
        assert not await pair.source.leave()
