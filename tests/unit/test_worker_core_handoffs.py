"""What a worker core asks of other workers and hands over to them: prompts, running sequences, prefixes."""

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
    EndMove,
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
from workers.status import PrefixHint, Role, WorkerAddress
from workers.wire.attach import Migration

PROMPT = make_request(range(5, 5 + 2 * BLOCK_SIZE), 50)
BLOCKS = PromptBlocks.of(PROMPT.prompt_token_ids, BLOCK_SIZE)
KEYS = tuple(BLOCKS.key(i) for i in range(2))
OTHER = WorkerAddress("prefill-1", GENERATION, "127.0.0.1:2")


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
