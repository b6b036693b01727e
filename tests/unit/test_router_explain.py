"""A decision explains itself: who could have taken a request, what each would have cost, who was taken and why."""

from __future__ import annotations

from typing import Any

import pytest
from fake_backend import MODEL as API_MODEL
from fake_backend import Api, open_api
from router_story import GENERATION, MIXED, MODEL, Story, request, the_submit

from router.events import Explain, RequestArrived
from router.policies.catalogue import POLICIES
from router.policies.explain import MAX_CANDIDATES, Decision, route_of
from router.policies.policy import Reason
from router.wishes import Wishes, session_number
from workers.kv_cache.block_hash import block_hashes
from workers.status import KvEvent, Role
from workers.wire.attach import WorkerFrame

PROMPT = tuple(range(400))


def explained(story: Story, **wishes: Any) -> tuple[Decision, str, tuple[str, ...]]:
    """The decision on one request, and where it went in truth."""
    commands = story.tell(RequestArrived(request("r", PROMPT), Wishes(explain=True, **wishes)))
    (decision,) = [command.decision for command in commands if isinstance(command, Explain)]
    worker, submit = the_submit(commands)
    return decision, worker, tuple(address.worker_id for address in submit.prefill_workers)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_is_explained_is_what_was_done(policy: str) -> None:
    roles = (Role.DECODE, Role.PREFILL)
    story = Story(*[(f"w-{index:02}", roles[index % 2]) for index in range(40)], policy=policy)
    decision, worker, prefill = explained(story)
    assert (decision.policy, decision.decode_worker, decision.prefill_workers) == (policy, worker, prefill)
    assert decision.num_decode_candidates == decision.num_prefill_candidates == 20
    for candidates, chosen in ((decision.decode, worker), (decision.prefill, prefill[0])):
        assert len(candidates) == MAX_CANDIDATES and candidates[0].worker_id == chosen
        assert all(abs(sum(one.costs.values()) - one.cost) < 1e-9 for one in candidates)


def test_the_parts_of_a_cost_say_what_made_the_difference() -> None:
    story = Story(*MIXED)
    story.frame("m-1", WorkerFrame(GENERATION, kv_events=(KvEvent(1, tuple(block_hashes(PROMPT, MODEL.block_size))),)))
    decision, worker, _ = explained(story)
    assert worker == "m-1" and decision.reason is Reason.CACHED_PREFIX and decision.is_local
    best, other = decision.decode
    assert (best.worker_id, best.cached_blocks, other.cached_blocks) == ("m-1", 100, 0)
    assert best.costs["first_token"] < other.costs["first_token"] and best.costs["answer"] == other.costs["answer"]
    assert story.count("routed_by_cached_prefix") == 1


def test_nobody_is_told_who_has_not_asked() -> None:
    commands = Story(*MIXED).tell(RequestArrived(request("r", PROMPT)))
    assert not any(isinstance(command, Explain) for command in commands)


def test_a_session_stays_where_it_was_as_long_as_that_is_not_dear() -> None:
    names = [(f"m-{index}", Role.MIXED) for index in range(8)]
    homes = {
        explained(Story(*names, policy="session_affinity"), session=session_number(f"s-{n}"))[1] for n in range(60)
    }
    assert len(homes) > 5, "sessions spread"
    story, worker = Story(*names, policy="session_affinity"), set()
    for index in range(6):
        prompt = tuple(range(index * 7, index * 7 + 40))
        arrived = RequestArrived(request(f"q{index}", prompt), Wishes(session=session_number("s")))
        worker.add(the_submit(story.tell(arrived))[0])
    assert len(worker) == 1


def test_a_span_gets_the_decision_in_short() -> None:
    decision, worker, _ = explained(Story(*MIXED))
    told = route_of([decision, None])
    assert told["decode_worker"] == told["prefill_worker"] == worker and str(told["candidates"]).count("=") == 2
    assert route_of([None]) == route_of([]) == {}


# ---- the API ----


@pytest.fixture(scope="module")
def api() -> Any:
    with open_api() as opened:
        yield opened


def ask(api: Api, **extra: Any) -> Any:
    return api.client.completions.create(model=API_MODEL.name, prompt="a day", max_tokens=3, extra_body=extra)


def test_a_client_that_asks_for_a_trace_is_told_how_it_was_routed(api: Api) -> None:
    (choice,) = ask(api, trace=True).baton["choices"]
    assert choice["routing"]["reason"] == "least_cost" and choice["routing"]["prefill_workers"] == ["prefill-0"]
    assert api.backend.wishes[-1].explain


def test_targets_and_session_reach_the_router(api: Api) -> None:
    ask(api, ttft=2, tpot=0.05, session_id="s", user="u")
    assert api.backend.wishes[-1] == Wishes(2.0, 0.05, session_number("s"))
    ask(api, user="u", prompt_cache_key="k")
    assert api.backend.wishes[-1] == Wishes(session=session_number("k"))
    ask(api, user={"any": "thing"})
    assert api.backend.wishes[-1] == Wishes()


@pytest.mark.parametrize("wrong", [0, -1, 3601, 1e300])
def test_a_target_that_makes_no_sense_is_refused_by_name(api: Api, wrong: float) -> None:
    answer = api.http.post("/v1/completions", json={"model": API_MODEL.name, "prompt": "a", "ttft": wrong})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "ttft"
    assert "seconds" in answer.json()["error"]["message"]
