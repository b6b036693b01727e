"""What a worker decides, told as stories over its pure core: no stream, no thread, no clock."""

from __future__ import annotations

from builders import make_request
from worker_story import GENERATION, LAYOUT, PEER, WorkerStory, permitted

from workers.engine.messages import (
    AddMigrant,
    AddSequence,
    BeginMove,
    BlocksFilled,
    BlocksFinal,
    CancelSequence,
    DumpKv,
    EndMove,
    ForgetCache,
    Halt,
    Halted,
    HoldPrefix,
    Landed,
    LayersFilled,
    MovedIn,
    Prefilled,
    PrefixHeld,
    Pulled,
    PullWanted,
    ReleasePrefix,
    Resume,
    TransferLost,
    TransferWanted,
)
from workers.errors import Refusal
from workers.handoff.protocol.messages import (
    Handoff,
    HandoffFailed,
    PrefillDone,
    PrefixDone,
    PromptSubject,
    RunningSubject,
    SequenceMoved,
    subject_of,
)
from workers.handoff.protocol.source_session import Filled, HandoffBroken
from workers.kv_cache.block_hash import PromptBlocks
from workers.request import FinishReason, Output, error_output
from workers.runner import BLOCK_SIZE, Sampled
from workers.scheduler.sequence import Kind
from workers.serving import events
from workers.serving.sessions import LOAD_INTERVAL_S, MAX_CACHE_EVENTS
from workers.status import Load, PrefixHint, Role, WorkerAddress
from workers.wire.attach import Migration

PROMPT = make_request(range(5, 5 + 2 * BLOCK_SIZE), 50)
BLOCKS = PromptBlocks.of(PROMPT.prompt_token_ids, BLOCK_SIZE)
HASHES = BLOCKS.hashes
KEYS = tuple(BLOCKS.key(i) for i in range(2))
OTHER = WorkerAddress("prefill-1", GENERATION, "127.0.0.1:2")


# ---- requests ----


def test_a_request_goes_to_the_engine_and_its_outputs_to_its_own_router() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    a, b = story.submit(1, "r"), story.submit(2, "r")  # two routers may use one name
    assert [type(c) for c in story.posted[-2:]] == [AddSequence, AddSequence] and a != b
    story.say(a, "r", 0, 11)
    story.say(b, "r", 0, 21)
    story.say(a, "r", 1, 12, ends=FinishReason.LENGTH)
    assert story.tokens(1, "r") == [11, 12] and story.tokens(2, "r") == [21]
    assert story.submit(1, "r")  # the name is free again
    assert not story.submit(2, "r") and story.last(2).refusal is Refusal.INVALID


def test_a_cancelled_request_says_nothing_more_and_the_engine_frees_it() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.cancel(1, "nobody")
    story.cancel(1, "r")
    assert story.posted[-1] == CancelSequence(number)
    story.say(number, "r", 0, 11)  # it was on its way
    assert story.heard(1) == [] and story.core.is_idle


def test_a_router_cannot_cancel_what_belongs_to_another() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    number = story.submit(1, "r")
    story.cancel(2, "r")
    story.say(number, "r", 0, 11)
    assert story.tokens(1, "r") == [11]


def test_what_is_not_taken_is_answered_at_once_with_the_reason() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    refusals = []
    for event, undo in (
        (events.SetDrain(True), events.SetDrain(False)),
        (events.Suspend("a rank"), events.Resumed()),
        (events.SwitchRole(Role.PREFILL), events.SwitchRole(Role.DECODE)),
    ):
        story.tell(event)
        assert not story.submit(1, "r")
        refusals.append(story.last(1).refusal)
        story.tell(undo)
        assert story.submit(1, "r")
        story.cancel(1, "r")
    assert not story.submit(1, "old", generation=GENERATION)
    assert [*refusals, story.last(1).refusal] == [
        Refusal.DRAINING, Refusal.SHUTTING_DOWN, Refusal.WRONG_ROLE, Refusal.STALE_GENERATION,
    ]  # fmt: skip


def test_what_an_engine_that_is_far_behind_does_not_take_is_refused_by_name() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.tell(events.NotAdded(number))
    assert story.last(1).refusal is Refusal.QUEUE_FULL and story.core.is_idle
    (opened,) = story.ask(1, PromptSubject(PROMPT), 2)
    assert isinstance(opened, events.AcceptHandoff)
    story.tell(events.HandoffBegun(1))
    story.tell(events.NotAdded(story.taken(AddSequence)[-1].sequence_id))
    (broken,) = story.fed(1)
    assert isinstance(broken, HandoffBroken) and broken.is_ours


# ---- what the worker is ----


def test_a_switch_raises_the_generation_is_told_to_all_and_lets_what_runs_run() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    number = story.submit(1, "r")
    story.tell(events.SwitchRole(Role.PREFILL))
    assert events.TellRole(Role.PREFILL, GENERATION + 1) in story.others
    for session in (1, 2):
        frame = story.frames[session][-1]
        assert frame.generation == GENERATION + 1 and frame.status is not None and frame.status.role is Role.PREFILL
    story.say(number, "r", 0, 11)
    assert story.tokens(1, "r") == [11]
    story.others.clear()
    story.tell(events.SwitchRole(Role.PREFILL))
    assert not story.others and story.identity.generation == GENERATION + 1


def test_draining_is_remembered_by_the_owner_only_when_it_is_to_outlive_a_restart() -> None:
    story = WorkerStory()
    story.attach(1)
    story.tell(events.SetDrain(True, remember=False))
    assert story.frames[1][-1].status is not None and story.frames[1][-1].status.is_draining
    assert not story.others
    story.tell(events.SetDrain(False))
    assert story.others == [events.TellDrain(False)]


def test_a_worker_that_suspends_gives_everything_back_in_a_new_generation() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.stuck.add(1)  # a frame is being written when it happens
    story.say(number, "r", 0, 11)
    story.tell(events.Suspend("rank 3"))
    story.tell(events.Suspend("rank 4"))
    story.stuck.clear()
    story.tell(events.FrameWanted(1))
    frame = story.frames[1][-1]
    # Whoever hears of it must not ask for what it ended: the status rides with the frame, in the new generation.
    assert frame.generation == GENERATION + 1 and frame.status is not None and frame.status.is_rebuilding
    assert story.last(1).refusal is Refusal.WORKER_LOST and "rank 3" not in story.last(1).message  # clients read it
    assert [c for c in story.posted if isinstance(c, CancelSequence | ForgetCache)] == [
        CancelSequence(number),
        ForgetCache(),
    ]
    assert events.FailHandoffs("rank 3") in story.others
    story.tell(events.Resumed())
    assert story.submit(1, "again")


def test_a_worker_that_stops_ends_its_requests_and_then_the_streams() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.stuck.add(1)
    story.say(number, "r", 0, 11)  # this frame is on its way out when the worker stops
    story.tell(events.Close())
    assert not story.ended
    story.stuck.clear()
    story.tell(events.FrameWanted(1))
    assert story.last(1).refusal is Refusal.SHUTTING_DOWN and story.ended == {1}
    assert CancelSequence(number) in story.posted
    story.tell(events.RouterAttached(2, "late"))
    story.tell(events.FrameWanted(2))
    assert story.ended == {1, 2} and len(story.frames[2]) == 1


def test_a_router_that_says_no_more_gets_what_waits_for_it_and_then_its_stream_ends() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.stuck.add(1)
    story.say(number, "r", 0, 11)
    story.say(number, "r", 1, 12)
    story.tell(events.RouterLeft(1))
    story.stuck.clear()
    story.tell(events.FrameWanted(1))
    assert story.tokens(1, "r") == [11, 12] and story.ended == {1}


# ---- who hears what, and when ----


def test_a_router_without_outputs_hears_of_the_load_a_few_times_a_second_and_not_with_each_step() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    number = story.submit(1, "r")
    story.after(LOAD_INTERVAL_S)
    before = {session: len(story.frames[session]) for session in (1, 2)}
    for position in range(100):
        story.say(number, "r", position, position)
        story.after(0.01)
    assert len(story.frames[1]) - before[1] >= 100
    assert len(story.frames[2]) - before[2] <= 1 / LOAD_INTERVAL_S + 2  # loads, and a status
    assert story.tokens(1, "r") == list(range(100))


def test_the_last_load_of_a_busy_time_is_said_though_no_step_follows() -> None:
    story = WorkerStory()
    story.attach(1)
    story.after(1.1)
    for running in range(5):
        story.step(load=Load(num_running=running))
    assert story.load(1) == Load(num_running=0)
    story.after(LOAD_INTERVAL_S)
    assert story.load(1) == Load(num_running=4)
    said = len(story.frames[1])
    story.after(LOAD_INTERVAL_S)
    assert len(story.frames[1]) == said  # nothing has changed since


def test_every_router_hears_about_once_a_second_that_the_worker_lives() -> None:
    story = WorkerStory()
    story.attach(1)
    story.after(1.0)
    before = len([f for f in story.frames[1] if f.status is not None])
    story.after(10.0)
    assert len([f for f in story.frames[1] if f.status is not None]) - before == 10


def test_a_dump_goes_to_the_router_that_asked_and_the_others_go_on_with_events() -> None:
    story = WorkerStory()
    story.attach(1, dump=(10, 11))
    story.step(stored=(12,))
    story.attach(2, dump=None)
    assert story.posted[-1] == DumpKv(2)
    story.step(stored=(13,))  # the dump that is on its way contains it
    story.step(stored=(14,), dump=(10, 11, 12, 13), askers=[2])
    story.after(LOAD_INTERVAL_S)
    first, second = ([event for frame in story.frames[s] for event in frame.kv_events] for s in (1, 2))
    assert [event.stored for event in first] == [(10, 11), (12,), (13,), (14,)]
    assert [event.stored for event in second] == [(10, 11, 12, 13), (14,)]
    for heard in (first, second):
        assert [event.sequence for event in heard] == list(range(1, len(heard) + 1))  # no gap
        assert [event.reset for event in heard] == [True] + [False] * (len(heard) - 1)


def test_a_dump_that_is_on_its_way_is_not_asked_for_again() -> None:
    story = WorkerStory()
    story.attach(1, dump=None)
    for _ in range(3):
        story.ask_for_dump(1)
    assert story.taken(DumpKv) == [DumpKv(1)]
    story.step(dump=(1,), askers=[1])
    story.ask_for_dump(1)
    assert len(story.taken(DumpKv)) == 2


def test_a_router_that_is_too_far_behind_for_events_gets_one_dump() -> None:
    story = WorkerStory()
    story.attach(1)
    story.after(LOAD_INTERVAL_S)
    story.stuck.add(1)
    story.after(1.0)  # a frame that is never written
    for block in range(MAX_CACHE_EVENTS + 1):
        story.step(stored=(block,))
    story.stuck.clear()
    story.posted.clear()
    story.tell(events.FrameWanted(1))
    story.step(stored=(1000,))
    story.after(1.0)
    assert story.taken(DumpKv) == [DumpKv(1)]
    story.step(dump=(1, 2, 3), askers=[1])
    assert story.frames[1][-1].kv_events[0].reset


def test_a_router_that_does_not_read_is_cut_off_at_the_bound_though_its_write_never_returns() -> None:
    story = WorkerStory(max_pending_frames=2, max_num_seqs=4, orphan_grace_s=0.0)
    story.attach(1)
    story.attach(2)
    slow, fast = story.submit(1, "slow"), story.submit(2, "fast")
    story.stuck.add(1)
    position = 0
    while not story.cut:
        story.say(slow, "slow", position, 1)
        story.say(fast, "fast", position, 1)
        position += 1
        assert position <= 2 * 4 + 2
    assert story.cut == {1} and CancelSequence(slow) in story.posted
    story.say(fast, "fast", position, 1)
    assert len(story.tokens(2, "fast")) == position + 1


# ---- handoffs asked for ----


def wanted(number: int) -> TransferWanted:
    return TransferWanted(number, 0, (3, 4))


def landed(token: int = 7, kv_bytes: int = 4096) -> Handoff:
    return Handoff(PrefillDone(token, None, 4, 0, 0.1), "shm", kv_bytes, 0.01)


def test_a_prompt_is_asked_of_one_worker_after_another_and_then_computed_here() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    number = story.submit(1, PROMPT, PEER, OTHER)
    assert story.posted[-1] == AddSequence(number, PROMPT, Kind.TARGET, None)
    story.step(transfers=[wanted(number)])
    for source in (PEER, OTHER):
        ask = story.others[-1]
        assert isinstance(ask, events.Receive) and ask.source == source and ask.blocks == (3, 4)
        story.tell(events.HandoffEnded(number, HandoffFailed("it is gone", Refusal.WORKER_LOST)))
    (lost,) = story.taken(TransferLost)
    assert lost.report.attempts == 3 and lost.report.recovery == "local"
    assert story.core.counters["handoffs_failed"] == 2 and story.core.counters["local_prefills_after_failure"] == 1


def test_a_prompt_that_landed_is_told_to_the_engine_with_how_it_came() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    number = story.submit(1, make_request(range(5, 105), replay=(7, 8)), PEER)
    story.step(transfers=[wanted(number)])
    ask = story.others[-1]
    assert isinstance(ask, events.Receive) and isinstance(ask.subject, PromptSubject)
    assert ask.subject.request.replay_token_ids == ()  # the decode worker's business
    story.tell(events.HandoffEnded(number, landed()))
    (told,) = story.taken(Landed)
    assert told.sampled == Sampled(number, 7, None)
    assert (told.report.prefill_worker, told.report.transport, told.report.attempts) == ("prefill-0", "shm", 1)


def test_a_prompt_that_ends_as_something_else_has_not_landed() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    number = story.submit(1, PROMPT, PEER)
    story.step(transfers=[wanted(number)])
    story.tell(events.HandoffEnded(number, Handoff(PrefixDone(2, 2), "shm", 1, 0.1)))
    assert not story.taken(Landed) and len(story.taken(TransferLost)) == 1


def test_a_cancelled_request_stops_its_transfer_and_asks_nobody_else() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    number = story.submit(1, PROMPT, PEER, OTHER)
    story.step(transfers=[wanted(number)])
    story.cancel(1, "r")
    assert not story.core.is_idle
    story.step(abandoned=[number])
    assert story.others[-1] == events.StopReceiving(number)
    story.tell(events.HandoffEnded(number, HandoffFailed("cut", Refusal.INTERNAL)))
    assert len(story.taken(TransferLost)) == 1 and len([c for c in story.others if isinstance(c, events.Receive)]) == 1
    late = story.submit(1, make_request(range(5, 105), request_id="late"), PEER)
    story.cancel(1, "late")
    story.step(transfers=[wanted(late)])  # it had been wanted before the engine heard of the cancel
    assert story.taken(TransferLost)[-1].sequence_id == late and story.core.is_idle


def test_a_running_sequence_is_taken_over_from_where_it_runs() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    number = story.submit(1, make_request(range(5, 105), replay=(7,)), migration=Migration(OTHER, "r#1"))
    assert isinstance(story.posted[-1], AddMigrant)
    story.step(transfers=[wanted(number)])
    ask = story.others[-1]
    assert isinstance(ask, events.Receive) and ask.subject == RunningSubject("r#1") and ask.source == OTHER
    story.tell(events.HandoffEnded(number, Handoff(SequenceMoved((7, 8), 101, 4), "shm", 4096, 0.01)))
    assert story.posted[-1] == MovedIn(number, (7, 8), 101)
    assert story.core.counters["migrations_in"] == 1


def test_a_prefix_is_pulled_only_where_that_beats_computing_and_not_waited_for_longer() -> None:
    story = WorkerStory()
    story.step(pulls=[PullWanted(5, PEER, 0, (3, 4), KEYS, prefill_tokens_per_s=64.0)])
    ask = story.others[-1]
    assert isinstance(ask, events.Receive) and ask.subject == subject_of(KEYS) and ask.patience_s == 2.0
    story.now += 2.0
    story.tell(events.HandoffEnded(5, HandoffFailed("it took too long", Refusal.INTERNAL)))
    assert story.posted[-1] == Pulled(5, 0)
    story.step(pulls=[PullWanted(6, PEER, 0, (3, 4), KEYS, prefill_tokens_per_s=1e6)])  # the peer is known to be slow
    assert story.posted[-1] == Pulled(6, 0) and story.core.counters["prefix_pulls_not_worth_it"] == 1
    story.step(pulls=[PullWanted(7, OTHER, 0, (3, 4), KEYS, prefill_tokens_per_s=64.0)])
    story.tell(events.HandoffEnded(7, Handoff(PrefixDone(2, 2), "shm", 2 * LAYOUT.block_bytes, 0.1)))
    assert story.posted[-1] == Pulled(7, 2) and story.core.is_idle


# ---- handoffs served ----


def test_a_prompt_is_computed_for_another_worker_and_held_until_it_is_released() -> None:
    story = WorkerStory(Role.PREFILL)
    hint = PrefixHint(OTHER, 1)
    assert story.ask(1, PromptSubject(PROMPT, hint), 2) == [events.AcceptHandoff(1, is_paced=False)]
    assert not story.posted  # nothing is computed before the receiver is connected to
    story.tell(events.HandoffBegun(1))
    (add,) = story.taken(AddSequence)
    assert (add.kind, add.hint) == (Kind.SOURCE, hint)
    number = add.sequence_id
    story.tell(events.LayersReported(LayersFilled(number, (8, 9), 0, 1, 1)))
    story.step(filled=[BlocksFilled(number, (8, 9), 1)])
    story.step(filled=[BlocksFilled(number, (8, 9), 2)], prefilled=[Prefilled(number, Sampled(number, 7), 0, 0.2)])
    layers = LAYOUT.num_layers
    assert story.fed(1)[:3] == [Filled((8, 9), 0, 1, 1), Filled((8, 9), 0, 1, layers), Filled((8, 9), 1, 2, layers)]
    done = story.fed(1)[3]
    assert isinstance(done, PrefillDone) and done.token_id == 7
    story.tell(events.HandoffReleased(1, ""))
    assert story.posted[-1] == CancelSequence(number) and story.core.is_idle


def test_a_prompt_that_the_engine_refuses_breaks_its_handoff() -> None:
    story = WorkerStory(Role.PREFILL)
    story.ask(1, PromptSubject(PROMPT), 2)
    story.tell(events.HandoffBegun(1))
    number = story.taken(AddSequence)[0].sequence_id
    story.step((number, error_output(PROMPT, Refusal.QUEUE_FULL, "512 wait")))
    assert story.fed(1) == [HandoffBroken("512 wait", is_ours=True)]


def test_who_may_not_have_a_handoff_is_told_why() -> None:
    story = WorkerStory(Role.PREFILL)
    refusals = []

    def refused(*arguments: object, **fields: object) -> None:
        (answer,) = story.ask(9, *arguments, **fields)  # type: ignore[arg-type]
        assert isinstance(answer, events.RefuseHandoff)
        refusals.append(answer.refusal)

    refused(PromptSubject(PROMPT), 2, source_generation=GENERATION - 1)
    refused(PromptSubject(PROMPT), 2, fingerprint="another")
    refused(PromptSubject(PROMPT), 3)
    refused(RunningSubject("nobody"), 2)
    story.tell(events.SetDrain(True))
    refused(PromptSubject(PROMPT), 2)
    story.tell(events.SwitchRole(Role.DECODE))
    story.tell(events.SetDrain(False))
    refused(PromptSubject(PROMPT), 2)
    story.tell(events.Suspend("a rank"))
    refused(PromptSubject(PROMPT), 2)
    assert refusals == [
        Refusal.STALE_GENERATION, Refusal.INVALID, Refusal.INVALID, Refusal.NOT_MOVABLE,
        Refusal.DRAINING, Refusal.WRONG_ROLE, Refusal.SHUTTING_DOWN,
    ]  # fmt: skip
    assert story.core.is_idle


def moving(story: WorkerStory) -> int:
    """A request that another worker takes over, up to the point where it stands still."""
    story.attach(1)
    number = story.submit(1, "r#1")
    story.say(number, "r#1", 0, 11)
    assert story.ask(4, permitted("r#1"), 3) == [events.AcceptHandoff(4, is_paced=True)]
    assert [c.refusal for c in story.ask(5, permitted("r#1"), 3) if isinstance(c, events.RefuseHandoff)] == [
        Refusal.NOT_MOVABLE
    ]
    story.tell(events.HandoffBegun(4))
    assert story.posted[-1] == BeginMove(number, 0, 3)
    story.step(exports=[BlocksFinal(number, (1, 2, 3), 0, 1, is_all=True)])
    story.tell(events.HandoffAcknowledged(4, 0))
    assert not story.taken(Halt)  # the receiver does not have all that is final
    story.tell(events.HandoffAcknowledged(4, 1))
    story.tell(events.HandoffAcknowledged(4, 1))
    assert story.taken(Halt) == [Halt(number)]
    story.step(exports=[BlocksFinal(number, (1, 2, 3), 1, 2, is_all=True), Halted(number, (11,), 101)])
    assert isinstance(story.fed(4)[-1], SequenceMoved)
    return number


def test_a_running_sequence_stands_still_when_its_receiver_has_caught_up_and_then_departs() -> None:
    story = WorkerStory()
    number = moving(story)
    story.tell(events.HandoffReleased(4, ""))
    assert story.posted[-1] == EndMove(number)
    story.step((number, Output("r#1", 1, finish_reason=FinishReason.MOVED)))
    assert story.last(1).finish_reason is FinishReason.MOVED and story.core.is_idle


def test_a_sequence_that_has_stood_still_for_too_long_goes_on_here() -> None:
    story = WorkerStory(max_pause_s=2.0)
    number = moving(story)
    story.after(1.9)
    assert not [event for event in story.fed(4) if isinstance(event, HandoffBroken)]
    story.after(0.2)
    assert [event.reason for event in story.fed(4) if isinstance(event, HandoffBroken)] == [
        "it has not landed within 2 s"
    ]
    story.tell(events.HandoffReleased(4, "it broke"))
    assert story.posted[-1] == Resume(number)
    story.after(5.0)
    assert len([event for event in story.fed(4) if isinstance(event, HandoffBroken)]) == 1


def test_a_prefix_is_held_for_a_peer_until_it_is_released() -> None:
    story = WorkerStory()
    story.ask(1, subject_of(KEYS), 2)
    story.tell(events.HandoffBegun(1))
    (hold,) = story.taken(HoldPrefix)
    assert hold.keys == KEYS
    story.step(held=[PrefixHeld(hold.export_id, (8,))])
    assert [type(event) for event in story.fed(1)] == [Filled, PrefixDone]
    story.tell(events.HandoffReleased(1, ""))
    assert story.posted[-1] == ReleasePrefix(hold.export_id)
