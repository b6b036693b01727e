"""Responses of the background, as the openai client sees them: queued, under way, ended, failed, stopped, forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_backend import serve, speak
from keeping_backend import KeepingBackend

from router.config import ApiConfig
from router.tenants.config import TenantsConfig
from router.tenants.roster import Key
from router.tenants.tenancy import Tenancy
from workers.errors import Refusal, Refused
from workers.request import end_output
from workers.text.tokenizer import Tokenizer

Served = tuple[KeepingBackend, Callable[[str], openai.OpenAI]]


@pytest.fixture(scope="module")
def served(thinking_folder: Path) -> Iterator[Served]:
    """With tenants, each of which may have two responses in the background."""
    backend = KeepingBackend(Tokenizer.load(thinking_folder))
    tenancy = Tenancy(TenantsConfig(enabled=True), secret=b"s")
    names = ("acme", "other", "third", "fourth", "fifth")
    tenancy.set_roster({}, [Key(name, name, hashlib.sha256(name.encode()).digest()) for name in names])
    with serve(backend, ApiConfig(max_background=2), tenancy=tenancy) as url:
        clients = {name: openai.OpenAI(base_url=f"{url}/v1", api_key=name, max_retries=0) for name in names}
        yield backend, clients.__getitem__
        for client in clients.values():
            client.close()


@pytest.fixture
def both(served: Served) -> Served:
    served[0].reset()
    return served


def begin(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(model="ernie-tiny", input="Hi", background=True, max_output_tokens=9, **fields)


def ended(client: openai.OpenAI, response_id: str) -> Any:
    while (found := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        pass
    return found


def wait_for_outcome(client: openai.OpenAI, outcome: str, tenant: str) -> None:
    """Until the tenant's first request with that outcome is over."""
    metrics = str(client.base_url).replace("/v1/", "/metrics")
    while f'outcome="{outcome}",tenant="{tenant}"}} 1.0' not in httpx.get(metrics).text:
        pass


def stalling(backend: KeepingBackend, *then: Any) -> None:
    """After two tokens nothing comes until the job is ended."""
    backend.script = lambda each, request: [*speak(each, request)[:2], backend.hang, *then]


def test_one_that_waits_is_queued_and_one_that_nobody_asked_for_is_there_when_workers_keep_it_no_more(
    both: Served,
) -> None:
    backend, client = both
    backend.is_waiting = True
    begun = begin(client("acme"))
    assert begun.status == "queued"
    assert client("acme").responses.input_items.list(begun.id).data[0].type == "message"
    backend.is_waiting = backend.is_kept = False
    response = ended(client("acme"), begun.id)
    assert response.status == "incomplete" and response.usage.output_tokens == 9
    backend.is_kept = True
    whole = client("acme").responses.create(model="ernie-tiny", input="Hi", max_output_tokens=9, extra_body={"seed": 5})
    seeded = ended(client("acme"), begin(client("acme"), extra_body={"seed": 5}).id)
    assert [item.model_dump(exclude={"id"}) for item in seeded.output] == [
        item.model_dump(exclude={"id"}) for item in whole.output
    ]


def test_one_that_failed_says_so_and_one_that_runs_is_in_progress_until_it_is_stopped(both: Served) -> None:
    backend, client = both
    backend.script = lambda each, request: [
        *speak(each, request)[:2],
        end_output(request.request_id, Refusal.WORKERS_DIED, "w-0, w-1"),
    ]
    failed = ended(client("acme"), begin(client("acme")).id)
    assert failed.status == "failed" and failed.error.code == "workers_died" and "w-0" not in failed.error.message
    stalling(backend, Refused(Refusal.CANCELLED, "stopped"))
    running = begin(client("acme"))
    assert client("acme").responses.retrieve(running.id).status == "in_progress"
    assert client("acme").responses.cancel(running.id).status == "cancelled"
    assert client("acme").responses.retrieve(running.id).status == "cancelled"
    backend.script = speak
    after = client("acme").responses.create(
        model="ernie-tiny", input="And now?", previous_response_id=running.id, max_output_tokens=2
    )
    prompt = backend.tokenizer.decode(backend.requests[-1].prompt_token_ids)
    assert after.status == "incomplete" and "user: Hi" in prompt, "the conversation goes on from what was asked"


def test_one_that_is_deleted_is_gone_whatever_comes_of_it(both: Served) -> None:
    backend, client = both
    stalling(backend, Refused(Refusal.CANCELLED, "stopped"))
    running = begin(client("acme"))
    client("acme").responses.delete(running.id)
    backend.is_kept = False
    with pytest.raises(openai.NotFoundError):
        client("acme").responses.retrieve(running.id)


def test_one_that_was_stopped_through_another_router_is_kept_by_nobody(both: Served) -> None:
    backend, client = both
    stalling(backend, Refused(Refusal.CANCELLED, "stopped"))
    running = begin(client("fifth"))
    backend.hang.release()
    wait_for_outcome(client("fifth"), "cancelled", "fifth")
    backend.is_kept = False
    with pytest.raises(openai.NotFoundError):
        client("fifth").responses.retrieve(running.id)


def test_one_that_another_router_has_had_deleted_is_not_told_here_any_more(both: Served) -> None:
    backend, client = both
    kept = client("acme").responses.create(model="ernie-tiny", input="Hi", max_output_tokens=9)
    backend.is_kept = False
    assert client("acme").responses.retrieve(kept.id).id == kept.id
    backend.on_job_ended(kept.id.removeprefix("resp_"))
    with pytest.raises(openai.NotFoundError):
        client("acme").responses.retrieve(kept.id)
    mine = client("acme").responses.create(model="ernie-tiny", input="Hi", max_output_tokens=9)
    client("acme").responses.delete(mine.id)
    assert backend.ended[-1] == mine.id.removeprefix("resp_"), "the other routers are told, wherever it is kept"


def test_one_that_another_router_has_had_deleted_as_it_ended_is_kept_by_nobody(both: Served) -> None:
    """A worker's frame may bring that the job is over together with its last output, which is taken a turn later."""
    backend, client = both
    backend.script = lambda each, request: [*speak(each, request)[:-1], backend.hang, speak(each, request)[-1]]
    running = begin(client("third"))
    backend.on_job_ended(running.id.removeprefix("resp_"))
    backend.hang.release()
    wait_for_outcome(client("third"), "ok", "third")
    backend.is_kept = False
    with pytest.raises(openai.NotFoundError):
        client("third").responses.retrieve(running.id)


def test_a_key_that_is_sent_again_tells_how_far_its_response_is(both: Served) -> None:
    backend, client = both
    backend.is_waiting = True
    key = {"idempotency-key": "mine"}
    first = begin(client("acme"), extra_headers=key)
    assert begin(client("acme"), extra_headers=key).id == first.id and len(backend.requests) == 1
    backend.is_waiting = False
    ended(client("acme"), first.id)
    again = begin(client("acme"), extra_headers=key)
    assert (again.id, again.status) == (first.id, "incomplete") and len(backend.requests) == 1


def test_a_tenant_that_has_too_many_keeps_nobody_else_out(both: Served) -> None:
    backend, client = both
    stalling(backend, Refused(Refusal.CANCELLED, "stopped"))
    held = [begin(client("acme")) for _ in range(2)]
    with pytest.raises(openai.RateLimitError):
        begin(client("acme"))
    other = begin(client("other"))
    assert client("other").responses.retrieve(other.id).status == "in_progress"
    for response in held:
        client("acme").responses.cancel(response.id)
    client("other").responses.cancel(other.id)


def test_all_tenants_together_have_four_times_what_one_may_have(both: Served) -> None:
    backend, client = both
    stalling(backend, Refused(Refusal.CANCELLED, "stopped"))
    held = [(name, begin(client(name))) for name in ("acme", "other", "third", "fourth") for _ in range(2)]
    with pytest.raises(openai.RateLimitError):
        begin(client("fifth"))
    for name, response in held:
        client(name).responses.cancel(response.id)
