"""Stories about the router core: values in, values out; no network and no clock."""

from __future__ import annotations

from router.config import RouterConfig
from router.core import RouterCore
from router.driver import make_policy
from router.events import (
    Attach,
    Command,
    Deliver,
    Detach,
    Event,
    FrameArrived,
    Reject,
    RequestArrived,
    RequestCancelled,
    Send,
    ShutDown,
    Tick,
    WorkerDetached,
    WorkersChanged,
)
from workers.client import Cancel, DumpRequest, Submit, WorkerFrame
from workers.errors import Refusal
from workers.kv_cache.block_hash import block_hashes
from workers.request import FinishReason, HandoffReport, Output, Request, SamplingParams, TokenLogprob
from workers.status import KvEvent, Load, ModelInfo, PrefixHint, Role, Tier, WorkerAddress, WorkerStatus

MODEL = ModelInfo("fake", "fingerprint", vocab_size=1000, max_model_len=4096, block_size=4)
GENERATION = 1 << 16
FREE = Load(num_free_blocks=1000, num_blocks=1000)


def request(name: str = "r", prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8, priority: int = 0) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=1), priority=priority)


class Story:
    """A core, the time, and what the core has asked for so far."""

    def __init__(self, *workers: tuple[str, Role], **settings: object) -> None:
        self.core = RouterCore(config := RouterConfig(model="unused", **settings), make_policy(config))  # type: ignore[arg-type]
        self.now = 100.0
        self.connections: dict[str, int] = {}
        self.commands: list[Command] = []
        self.members = tuple(WorkerAddress(name, GENERATION, f"host:{name}") for name, _ in workers)
        if workers:
            self.tell(WorkersChanged(self.members))
        for name, role in workers:
            self.report(name, role)
        self.commands.clear()

    def tell(self, event: Event) -> list[Command]:
        commands = self.core.handle(event, self.now)
        for command in commands:
            if isinstance(command, Attach):
                self.connections[command.worker_id] = command.connection
        self.commands += commands
        return commands

    def frame(self, worker: str, frame: WorkerFrame) -> list[Command]:
        return self.tell(FrameArrived(worker, self.connections[worker], frame))

    def report(
        self, worker: str, role: Role, generation: int = GENERATION, load: Load = FREE, model: ModelInfo = MODEL
    ) -> list[Command]:
        status = WorkerStatus(worker, generation, role, model, load, pid=generation >> 16)
        return self.frame(worker, WorkerFrame(generation, status=status))

    def output(self, worker: str, name: str, position: int, *tokens: int, finish: bool = False) -> list[Command]:
        reason = FinishReason.LENGTH if finish else None
        text = "".join(f"<{token}>" for token in tokens)
        return self.frame(
            worker, WorkerFrame(GENERATION, (Output(name, position, tokens, text, finish_reason=reason),))
        )

    def refuse(self, worker: str, name: str, refusal: Refusal) -> list[Command]:
        output = Output(name, 0, finish_reason=FinishReason.ERROR, refusal=refusal, message="no")
        return self.frame(worker, WorkerFrame(GENERATION, (output,)))

    def lose(self, worker: str) -> list[Command]:
        return self.tell(WorkerDetached(worker, self.connections[worker], "broken pipe"))

    def after(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.tell(Tick())

    def count(self, name: str) -> int:
        return self.core.counters[name]


def submits(commands: list[Command]) -> list[tuple[str, Submit]]:
    return [(c.worker_id, c.message) for c in commands if isinstance(c, Send) and isinstance(c.message, Submit)]


def the_submit(commands: list[Command]) -> tuple[str, Submit]:
    (only,) = submits(commands)
    return only


def outputs(commands: list[Command]) -> list[Output]:
    return [command.output for command in commands if isinstance(command, Deliver)]


def messages(commands: list[Command], kind: type) -> list[object]:
    return [command.message for command in commands if isinstance(command, Send) and isinstance(command.message, kind)]


PD = (("d-0", Role.DECODE), ("d-1", Role.DECODE), ("p-0", Role.PREFILL), ("p-1", Role.PREFILL))
MIXED = (("m-0", Role.MIXED), ("m-1", Role.MIXED))


# ---- routing ----


def test_a_request_goes_to_a_decode_worker_with_the_prefill_workers_to_try() -> None:
    worker, submit = the_submit(Story(*PD).tell(RequestArrived(request())))
    assert worker.startswith("d-") and submit.generation == GENERATION
    assert {address.worker_id for address in submit.prefill_workers} == {"p-0", "p-1"}
    assert submit.request.request_id == "r#1"


def test_a_lone_mixed_worker_computes_the_prompt_itself() -> None:
    worker, submit = the_submit(Story(("m-0", Role.MIXED)).tell(RequestArrived(request())))
    assert (worker, submit.prefill_workers) == ("m-0", ())


def test_without_prefill_workers_a_decode_worker_computes_the_prompt_itself() -> None:
    story = Story(*PD)
    story.lose("p-0")
    story.lose("p-1")
    assert the_submit(story.tell(RequestArrived(request())))[1].prefill_workers == ()


def test_a_burst_spreads_before_any_load_report_arrives() -> None:
    story = Story(*PD)
    decode, prefill = [], []
    for index in range(20):
        prompt = tuple(range(index * 50, index * 50 + 40))
        worker, submit = the_submit(story.tell(RequestArrived(request(f"r{index}", prompt))))
        decode.append(worker)
        prefill.append(submit.prefill_workers[0].worker_id)
    assert decode.count("d-0") == 10 and prefill.count("p-0") == 10


def test_a_load_report_of_before_the_burst_does_not_hide_it() -> None:
    story = Story(*PD)
    first, _ = the_submit(story.tell(RequestArrived(request("a"))))
    story.report(first, Role.DECODE)
    assert the_submit(story.tell(RequestArrived(request("b", (7, 8)))))[0] != first
    story.after(1.0)
    for worker in ("d-0", "d-1"):
        story.report(worker, Role.DECODE)
    assert all(not entry.charges for entry in story.core.fleet if entry.worker_id.startswith("d-"))


def test_a_request_goes_where_its_prefix_is_cached() -> None:
    for holder in ("m-0", "m-1"):
        story = Story(*MIXED)
        prompt = tuple(range(400))
        event = KvEvent(1, tuple(block_hashes(prompt, MODEL.block_size)))
        story.frame(holder, WorkerFrame(GENERATION, kv_events=(event,)))
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == holder


def told(prompt: tuple[int, ...], tier: Tier = Tier.POOL, num_blocks: int | None = None) -> WorkerFrame:
    """A worker's first word on what it caches."""
    hashes = tuple(block_hashes(prompt, MODEL.block_size)[:num_blocks])
    return WorkerFrame(GENERATION, kv_events=(KvEvent(1, hashes, tiers=(tier,) * len(hashes)),))


def test_a_prefix_on_disk_is_better_than_none_and_worse_than_one_in_the_pool() -> None:
    prompt = tuple(range(400))
    settings = {"lower_tier_cost_tokens": 1}
    for holder in ("m-0", "m-1"):
        story = Story(*MIXED, **settings)
        story.frame(holder, told(prompt, Tier.DISK))
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == holder
        story = Story(*MIXED, **settings)
        story.frame(holder, told(prompt))
        story.frame("m-0" if holder == "m-1" else "m-1", told(prompt, Tier.DISK))
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == holder


def test_the_worker_that_computes_a_prompt_is_told_who_has_its_beginning() -> None:
    prompt = tuple(range(400))
    story = Story(*PD, pull_min_blocks=10)
    story.frame("d-1", told(prompt, num_blocks=60))
    story.report("d-1", Role.DECODE, load=Load(num_running=50, num_free_blocks=1000))
    worker, submit = the_submit(story.tell(RequestArrived(request(prompt=prompt))))
    assert worker == "d-0"
    assert submit.prefix == PrefixHint(WorkerAddress("d-1", GENERATION, "host:d-1"), 60)


def test_nobody_is_sent_for_few_blocks_or_for_what_is_on_a_disk() -> None:
    prompt = tuple(range(400))
    for frame, least in ((told(prompt, num_blocks=9), 10), (told(prompt, Tier.DISK), 10), (told(prompt), 0)):
        story = Story(*PD, pull_min_blocks=least)
        story.frame("d-1", frame)
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[1].prefix is None
    story = Story(*PD, pull_min_blocks=10)
    story.frame("d-1", told(prompt, num_blocks=60))
    for prefill in ("p-0", "p-1"):
        story.frame(prefill, told(prompt, Tier.HOST, num_blocks=55))
    assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[1].prefix is None


def test_a_cached_prefix_does_not_outweigh_a_long_line() -> None:
    story = Story(*MIXED)
    prompt = tuple(range(400))
    event = KvEvent(1, tuple(block_hashes(prompt, MODEL.block_size)))
    story.frame("m-0", WorkerFrame(GENERATION, kv_events=(event,), load=Load(num_running=30, num_free_blocks=1000)))
    assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == "m-1"


def test_a_worker_without_room_for_the_kv_comes_last() -> None:
    story = Story(*MIXED)
    story.report("m-0", Role.MIXED, load=Load(num_free_blocks=1, num_blocks=1000))
    story.report("m-1", Role.MIXED, load=Load(num_running=9, num_free_blocks=900, num_blocks=1000))
    assert the_submit(story.tell(RequestArrived(request())))[0] == "m-1"


def test_round_robin_takes_workers_in_turn() -> None:
    story = Story(*PD, policy="round_robin")
    routes = [the_submit(story.tell(RequestArrived(request(f"r{index}")))) for index in range(4)]
    assert [worker for worker, _ in routes] == ["d-0", "d-1", "d-0", "d-1"]
    assert [submit.prefill_workers[0].worker_id for _, submit in routes] == ["p-0", "p-1", "p-0", "p-1"]


def test_a_worker_of_another_model_gets_nothing() -> None:
    story = Story(("m-0", Role.MIXED), ("m-1", Role.MIXED))
    story.report("m-1", Role.MIXED, model=ModelInfo("other", "other", 10, 4096, 4))
    assert {the_submit(story.tell(RequestArrived(request(f"r{i}"))))[0] for i in range(4)} == {"m-0"}


# ---- outputs ----


def test_outputs_reach_the_client_under_its_own_name() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    (first,) = outputs(story.output("m-0", "r#1", 0, 5, 6))
    (last,) = outputs(story.output("m-0", "r#1", 2, 7, finish=True))
    assert (first.request_id, first.token_ids, last.position, last.finish_reason) == ("r", (5, 6), 2, "length")
    assert story.core.flights.num_running == 0


def test_a_duplicate_frame_is_delivered_once() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    assert outputs(story.output("m-0", "r#1", 0, 5)) == []
    assert story.count("repeated_outputs") == 1


def test_an_overlap_without_text_is_trimmed_with_its_logprobs() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5, 6)
    logprobs = tuple(TokenLogprob(token, -1.0) for token in (6, 7))
    (output,) = outputs(story.frame("m-0", WorkerFrame(GENERATION, (Output("r#1", 1, (6, 7), logprobs=logprobs),))))
    assert (output.position, output.token_ids, output.logprobs) == (2, (7,), logprobs[1:])


def test_an_overlap_whose_text_cannot_be_divided_is_run_again() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5, 6)
    commands = story.output("m-0", "r#1", 1, 6, 7)
    assert outputs(commands) == [] and messages(commands, Cancel) == [Cancel("r#1")]
    assert the_submit(commands)[1].request.replay_token_ids == (5, 6)


def test_wrong_tokens_end_the_request_rather_than_reach_the_client() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    story.output(worker, "r#1", 0, 5, 6)
    commands = story.output(worker, "r#1", 0, 5, 9)
    (output,) = outputs(commands)
    assert (output.token_ids, output.refusal, output.position) == ((), Refusal.INTERNAL, 2)
    assert messages(commands, Cancel) == [Cancel("r#1")]


def test_a_gap_is_filled_by_running_again() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    commands = story.output("m-0", "r#1", 2, 7)
    assert outputs(commands) == [] and the_submit(commands)[1].request.replay_token_ids == (5,)
    assert outputs(story.output("m-0", "r#1", 3, 8)) == []
    assert story.count("stale_outputs") == 1
    assert outputs(story.output("m-0", "r#2", 1, 6))[0].token_ids == (6,)


def test_first_output_extras_come_once_although_a_second_worker_sends_them_again() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    report = HandoffReport("m-0", "m-0", "local")
    told = Output("r#1", 0, (5,), handoff=report, prompt_logprobs=(None,), cached_tokens=4)
    (first,) = outputs(story.frame(worker, WorkerFrame(GENERATION, (told,))))
    other, _ = the_submit(story.lose(worker))
    again = Output("r#2", 1, (6,), handoff=report, prompt_logprobs=(None,), cached_tokens=4)
    (second,) = outputs(story.frame(other, WorkerFrame(GENERATION, (again,))))
    assert (first.handoff, first.prompt_logprobs, first.cached_tokens) == (report, (None,), 4)
    assert (second.handoff, second.prompt_logprobs, second.cached_tokens) == (None, None, 0)


# ---- faults ----


def test_a_lost_worker_hands_its_requests_to_another_with_the_tokens_to_replay() -> None:
    story = Story(*PD)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    story.output(worker, "r#1", 0, 5, 6)
    other, submit = the_submit(story.lose(worker))
    assert other != worker and other.startswith("d-")
    assert submit.request == Request("r#2", (1, 2, 3), request().params, replay_token_ids=(5, 6))
    assert outputs(story.output(other, "r#2", 2, 7, finish=True))[0].token_ids == (7,)
    assert story.count("reruns_worker_lost") == 1 and story.count("replayed_tokens") == 2


def test_a_worker_that_falls_silent_is_given_up() -> None:
    story = Story(*MIXED, worker_stale_s=5.0)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    other = "m-1" if worker == "m-0" else "m-0"
    story.now += 4.0
    story.report(other, Role.MIXED)
    old = story.connections[worker]
    commands = story.after(2.0)
    assert Detach(worker, old) in commands and the_submit(commands)[0] == other
    late = Output("r#1", 0, (5,))
    assert outputs(story.tell(FrameArrived(worker, old, WorkerFrame(GENERATION, (late,))))) == []
    assert story.count("stale_frames") == 1 and story.count("workers_lost_stale") == 1


def test_a_restarted_worker_is_not_taken_for_the_one_before() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    old = story.connections["m-0"]
    commands = story.tell(WorkersChanged((WorkerAddress("m-0", 2 << 16, "host:new"),)))
    assert Detach("m-0", old) in commands and Attach("m-0", old + 1, "host:new") in commands
    assert submits(commands) == []
    story.report("m-0", Role.MIXED, generation=1 << 16)
    assert story.core.counters["workers_lost_stale_process"] == 0 and not story.core.fleet.can_decode
    story.after(1.0)
    _, submit = the_submit(story.report("m-0", Role.MIXED, generation=2 << 16))
    assert submit.generation == 2 << 16 and submit.request.replay_token_ids == (5,)


def test_a_stream_that_leads_to_another_worker_is_closed() -> None:
    story = Story(("m-0", Role.MIXED))
    connection = story.connections["m-0"]
    status = WorkerStatus("m-7", GENERATION, Role.MIXED, MODEL, FREE)
    assert story.frame("m-0", WorkerFrame(GENERATION, status=status)) == [Detach("m-0", connection)]


def test_a_role_switch_leaves_running_requests_where_they_are() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    story.report(worker, Role.PREFILL, generation=GENERATION + 1)
    assert outputs(story.output(worker, "r#1", 0, 5))[0].token_ids == (5,)
    other, _ = the_submit(story.tell(RequestArrived(request("next"))))
    assert other != worker


def test_a_refusal_for_an_old_generation_is_answered_with_the_new_one() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    refusal = Output("r#1", 0, finish_reason=FinishReason.ERROR, refusal=Refusal.STALE_GENERATION)
    _, submit = the_submit(story.frame("m-0", WorkerFrame(GENERATION + 1, (refusal,))))
    assert submit.generation == GENERATION + 1 and submit.request.request_id == "r#2"


def test_a_busy_worker_is_left_for_another() -> None:
    for refusal in (Refusal.QUEUE_FULL, Refusal.SHUTTING_DOWN, Refusal.WRONG_ROLE):
        story = Story(*MIXED)
        worker, _ = the_submit(story.tell(RequestArrived(request())))
        assert the_submit(story.refuse(worker, "r#1", refusal))[0] != worker


def test_busy_workers_are_asked_again_with_growing_pauses_until_patience_ends() -> None:
    story = Story(("m-0", Role.MIXED), recovery_timeout_s=10.0)
    story.tell(RequestArrived(request()))
    attempt = 1
    while not outputs(story.refuse("m-0", f"r#{attempt}", Refusal.QUEUE_FULL)):
        attempt += 1
        while not submits(story.commands):
            story.after(0.1)
            story.report("m-0", Role.MIXED)
        story.commands.clear()
    assert 5 < attempt < 20 and story.now > 110.0
    assert outputs(story.commands)[-1].refusal is Refusal.QUEUE_FULL


def test_an_invalid_request_is_not_run_again() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    commands = story.refuse(worker, "r#1", Refusal.INVALID)
    assert [output.refusal for output in outputs(commands)] == [Refusal.INVALID] and submits(commands) == []


def test_an_internal_error_is_run_again_once_and_elsewhere() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    other, _ = the_submit(story.refuse(worker, "r#1", Refusal.INTERNAL))
    assert other != worker
    assert [output.refusal for output in outputs(story.refuse(other, "r#2", Refusal.INTERNAL))] == [Refusal.INTERNAL]


def test_a_request_that_kills_its_workers_is_given_up() -> None:
    story = Story(*MIXED, max_attempts=3)
    story.tell(RequestArrived(request()))
    attempts = 0
    while not outputs(story.commands):
        attempts += len(submits(story.commands))
        (worker,) = [worker for worker, _ in submits(story.commands)] or [""]
        story.commands.clear()
        if worker:
            story.lose(worker)
        else:
            story.after(0.2)
            for name, connection in story.connections.items():
                if story.core.fleet.on_connection(name, connection):
                    story.report(name, Role.MIXED)
    assert attempts == 3 and outputs(story.commands)[0].refusal is Refusal.WORKER_LOST


def test_a_request_that_makes_progress_survives_any_number_of_losses() -> None:
    story = Story(("m-0", Role.MIXED), max_attempts=2)
    story.tell(RequestArrived(request(max_tokens=64)))
    for position in range(20):
        assert outputs(story.output("m-0", f"r#{position + 1}", position, position))
        story.lose("m-0")
        story.after(3.0)
        story.report("m-0", Role.MIXED)


def test_a_request_waits_for_a_worker_to_come_back_and_not_for_ever() -> None:
    story = Story(("m-0", Role.MIXED), recovery_timeout_s=60.0)
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    story.lose("m-0")
    story.tell(RequestArrived(request("new")))
    assert outputs(story.after(59.0)) == []
    ended = outputs(story.after(2.0))
    assert {(output.request_id, output.refusal) for output in ended} == {
        ("r", Refusal.NO_WORKERS),
        ("new", Refusal.NO_WORKERS),
    }
    assert len(story.core.flights) == 0


def test_a_worker_that_leaves_the_cluster_ends_what_it_runs_and_gets_no_more() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    connection = story.connections[worker]
    story.tell(WorkersChanged(tuple(address for address in story.members if address.worker_id != worker)))
    assert the_submit(story.tell(RequestArrived(request("next"))))[0] != worker
    assert outputs(story.output(worker, "r#1", 0, 5, finish=True))
    assert Detach(worker, connection) in story.after(0.1)
    story.after(0.1)
    assert story.core.fleet.get(worker) is None


def test_reconnecting_backs_off() -> None:
    story = Story(("m-0", Role.MIXED))
    tries = 0
    for _ in range(100):
        story.lose("m-0")
        tries += sum(isinstance(command, Attach) for command in story.after(0.1))
    assert 5 <= tries <= 12


# ---- admission and ends ----


def test_without_any_worker_ever_a_request_is_refused_at_once() -> None:
    (rejection,) = Story().tell(RequestArrived(request()))
    assert isinstance(rejection, Reject) and rejection.refusal is Refusal.NO_WORKERS


def test_the_queue_is_bounded_and_takes_the_most_urgent_first() -> None:
    story = Story(("m-0", Role.MIXED), max_running=1, max_queue=3)
    story.tell(RequestArrived(request("running")))
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        assert story.tell(RequestArrived(request(name, priority=priority))) == []
    (rejection,) = story.tell(RequestArrived(request("d", priority=-1)))
    assert isinstance(rejection, Reject) and rejection.refusal is Refusal.QUEUE_FULL
    order = []
    running = "running"
    for _ in range(3):
        _, submit = the_submit(story.output("m-0", f"{running}#1", 0, 1, finish=True))
        running = submit.request.request_id.removesuffix("#1")
        order.append(running)
    assert order == ["b", "c", "a"]


def test_a_request_that_cannot_fit_is_the_callers_fault() -> None:
    story = Story(("m-0", Role.MIXED))
    for bad in (request(prompt=()), request(prompt=tuple(range(5000)))):
        (rejection,) = story.tell(RequestArrived(bad))
        assert isinstance(rejection, Reject) and rejection.refusal is Refusal.INVALID


def test_a_cancelled_request_is_cancelled_on_its_worker_and_forgotten() -> None:
    story = Story(("m-0", Role.MIXED), max_running=1)
    story.tell(RequestArrived(request()))
    story.tell(RequestArrived(request("waiting")))
    assert story.tell(RequestCancelled("waiting")) == []
    assert messages(story.tell(RequestCancelled("r")), Cancel) == [Cancel("r#1")]
    assert story.output("m-0", "r#1", 0, 5) == []
    assert len(story.core.flights) == 0 and story.count("stale_outputs") == 1


def test_a_request_that_takes_too_long_is_ended() -> None:
    story = Story(("m-0", Role.MIXED), request_timeout_s=2.0)
    story.tell(RequestArrived(request()))
    commands = story.after(3.0)
    assert [output.refusal for output in outputs(commands)] == [Refusal.DEADLINE_EXCEEDED]
    assert messages(commands, Cancel) == [Cancel("r#1")]


def test_shutting_down_ends_everything() -> None:
    story = Story(*MIXED)
    story.tell(RequestArrived(request()))
    commands = story.tell(ShutDown())
    assert [output.refusal for output in outputs(commands)] == [Refusal.SHUTTING_DOWN]
    assert sum(isinstance(command, Detach) for command in commands) == 2
    assert [type(command) for command in story.tell(RequestArrived(request("late")))] == [Reject]
    assert story.after(10.0) == []


# ---- prefix events ----


def test_a_missed_cache_event_asks_for_a_dump_once() -> None:
    story = Story(("m-0", Role.MIXED))
    story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(1, (11, 12)),)))
    gap = story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(3, (13,)),)))
    assert messages(gap, DumpRequest) == [DumpRequest()]
    assert story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(4, (14,)),))) == []
    story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(4, (11, 13, 14), reset=True), KvEvent(5, (15,)))))
    assert [story.core.index.match("m-0", [block]) for block in (11, 12, 13, 14, 15)] == [1, 0, 1, 1, 1]
    assert story.count("prefix_index_gaps") == 1
