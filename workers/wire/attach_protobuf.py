"""Translates what routers and workers say between protobuf messages and the values of workers.*; decides nothing.

Each value has a pair: `x_to_pb` and `x_from_pb`. `x_from_pb` raises ValueError where a name (a role, a finish reason)
is unknown.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import inf, isfinite

from workers.kv_memory.memory import KvLayout
from workers.limits import ALTERNATIVES, DEFAULT_LIMITS, RequestLimits
from workers.pb import worker_pb2 as pb
from workers.request import FinishReason, make_tuple
from workers.status import KvEvent, Load, ModelInfo, PrefixHint, RankStatus, Role, Tier, WorkerAddress, WorkerStatus
from workers.wire.attach import (
    Adopt,
    Cancel,
    DumpRequest,
    Find,
    Found,
    FoundRequest,
    Kept,
    Migration,
    RouterHello,
    RouterMessage,
    Submit,
    Waits,
    WorkerFrame,
)
from workers.wire.request_protobuf import (
    fields_of,
    from_fields,
    output_from_pb,
    output_to_pb,
    request_from_pb,
    request_to_pb,
)


def address_to_pb(address: WorkerAddress) -> pb.WorkerAddress:
    return pb.WorkerAddress(**fields_of(address))


def address_from_pb(message: pb.WorkerAddress) -> WorkerAddress:
    return from_fields(WorkerAddress, message)


def hint_to_pb(hint: PrefixHint) -> pb.PrefixHint:
    return pb.PrefixHint(peer=address_to_pb(hint.peer), num_blocks=hint.num_blocks)


def hint_from_pb(message: pb.PrefixHint) -> PrefixHint:
    return PrefixHint(address_from_pb(message.peer), message.num_blocks)


def load_to_pb(load: Load) -> pb.Load:
    return pb.Load(**load._asdict())


def load_from_pb(message: pb.Load) -> Load:
    """By hand, and in the order of the fields: it comes with every step of every worker. Raises ValueError."""
    step_s = message.step_s
    if not 0.0 <= step_s < inf:
        raise ValueError(f"a step of {step_s} s")
    fields = (
        message.num_waiting,
        message.num_running,
        message.num_transferring,
        message.waiting_prefill_tokens,
        message.num_free_blocks,
        message.num_blocks,
        step_s,
        message.step_decodes,
        message.step_context,
        message.step_prompt_tokens,
        message.step_prompt_context,
    )
    return make_tuple(Load, fields)


def kv_event_to_pb(event: KvEvent) -> pb.KvEvent:
    return pb.KvEvent(
        sequence=event.sequence, stored=event.stored, removed=event.removed, reset=event.reset, tiers=event.tiers
    )


def kv_event_from_pb(message: pb.KvEvent) -> KvEvent:
    """Raises ValueError for a tier that this version does not know."""
    tiers = tuple([Tier(tier) for tier in message.tiers])
    return KvEvent(message.sequence, tuple(message.stored), tuple(message.removed), message.reset, tiers)


def model_to_pb(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(**fields_of(model) | {"limits": pb.RequestLimits(**fields_of(model.limits))})


def model_from_pb(message: pb.ModelInfo) -> ModelInfo:
    """Raises ValueError for a model that nothing can be computed of."""
    limits = from_fields(RequestLimits, message.limits) if message.HasField("limits") else DEFAULT_LIMITS
    limits = replace(limits, logprobs=limits.logprobs or ALTERNATIVES)
    model = replace(from_fields(ModelInfo, message), limits=limits)
    if min(model.vocab_size, model.max_model_len, model.block_size) < 1:
        raise ValueError("a model without vocabulary, context or blocks")
    return model


def status_to_pb(status: WorkerStatus) -> pb.WorkerStatus:
    return pb.WorkerStatus(
        worker_id=status.worker_id,
        generation=status.generation,
        role=status.role.value,
        model=model_to_pb(status.model),
        load=load_to_pb(status.load),
        pid=status.pid,
        host=status.host,
        kv_block_bytes=status.kv_block_bytes,
        counters=[pb.Counter(name=name, value=value) for name, value in status.counters],
        is_draining=status.is_draining,
        ranks=[pb.RankStatus(**fields_of(rank)) for rank in status.ranks],
        is_rebuilding=status.is_rebuilding,
        max_num_seqs=status.max_num_seqs,
        max_batch_tokens=status.max_batch_tokens,
        num_routers=status.num_routers,
    )


MAX_COUNTERS = 512
"""Of a worker's status; each becomes a metric."""


def _counters_from_pb(message: pb.WorkerStatus) -> tuple[tuple[str, float], ...]:
    counters = tuple((counter.name, counter.value) for counter in message.counters)
    if len(counters) > MAX_COUNTERS or not all(isfinite(value) and len(name) <= 64 for name, value in counters):
        raise ValueError("counters that cannot be counters")
    return counters


def status_from_pb(message: pb.WorkerStatus) -> WorkerStatus:
    """Raises ValueError for an unknown role, and for figures that no worker has."""
    return WorkerStatus(
        worker_id=message.worker_id,
        generation=message.generation,
        role=Role(message.role),
        model=model_from_pb(message.model),
        load=load_from_pb(message.load),
        pid=message.pid,
        host=message.host,
        kv_block_bytes=message.kv_block_bytes,
        counters=_counters_from_pb(message),
        is_draining=message.is_draining,
        ranks=tuple(from_fields(RankStatus, rank) for rank in message.ranks),
        is_rebuilding=message.is_rebuilding,
        max_num_seqs=message.max_num_seqs,
        max_batch_tokens=message.max_batch_tokens,
        num_routers=message.num_routers,
    )


@lru_cache(maxsize=64)
def layout_to_pb(layout: KvLayout) -> pb.KvLayout:
    """A worker has one layout, and every handoff says it: not to be changed."""
    return pb.KvLayout(**fields_of(layout))


def layout_from_pb(message: pb.KvLayout) -> KvLayout:
    return from_fields(KvLayout, message)


def found_to_pb(found: Found) -> pb.Found:
    requests = [
        pb.FoundRequest(**fields_of(each) | {"finish_reason": each.finish_reason or ""}) for each in found.requests
    ]
    fixed = {name: value for name, value in fields_of(found).items() if name != "requests"}
    return pb.Found(requests=requests, **fixed)


def found_from_pb(message: pb.Found) -> Found:
    """Raises ValueError for an unknown finish reason."""
    requests = tuple(
        replace(from_fields(FoundRequest, each), finish_reason=_finish_reason(each.finish_reason))
        for each in message.requests
    )
    return Found(message.number, requests, message.num_requests, message.ticket, message.is_waiting)


def _finish_reason(name: str) -> FinishReason | None:
    return FinishReason(name) if name else None


def frame_to_pb(frame: WorkerFrame) -> pb.WorkerFrame:
    message = pb.WorkerFrame(generation=frame.generation, outputs=[output_to_pb(output) for output in frame.outputs])
    if frame.load is not None:
        message.load.CopyFrom(load_to_pb(frame.load))
    if frame.kv_events:
        message.kv_events.extend([kv_event_to_pb(event) for event in frame.kv_events])
    if frame.status is not None:
        message.status.CopyFrom(status_to_pb(frame.status))
    if frame.found:
        message.found.extend([found_to_pb(found) for found in frame.found])
    if frame.ended_jobs:
        message.ended_jobs.extend(frame.ended_jobs)
    return message


def frame_from_pb(message: pb.WorkerFrame) -> WorkerFrame:
    events, found, ended_jobs = message.kv_events, message.found, message.ended_jobs
    return WorkerFrame(
        message.generation,
        tuple([output_from_pb(output) for output in message.outputs]),
        load_from_pb(message.load) if message.HasField("load") else None,
        tuple([kv_event_from_pb(event) for event in events]) if events else (),
        status_from_pb(message.status) if message.HasField("status") else None,
        tuple([found_from_pb(each) for each in found]) if found else (),
        tuple(ended_jobs) if ended_jobs else (),
    )


def _submit_to_pb(submit: Submit) -> pb.Submit:
    message = pb.Submit(
        request=request_to_pb(submit.request),
        generation=submit.generation,
        prefill_workers=[address_to_pb(address) for address in submit.prefill_workers],
        remaining_s=submit.remaining_s,
        first_token_s=submit.first_token_s,
        prefix=hint_to_pb(submit.prefix) if submit.prefix is not None else None,
        name=submit.name,
        key=submit.key,
        kept=pb.Kept(**fields_of(submit.kept)) if submit.kept is not None else None,
        cached_tokens=submit.cached_tokens,
    )
    if (moved := submit.migration) is not None:
        source = address_to_pb(moved.source)
        message.migration.CopyFrom(pb.Migration(source=source, request_id=moved.request_id, permit=moved.permit))
    return message


def router_message_to_pb(message: RouterMessage) -> pb.RouterMessage:
    match message:
        case Submit():
            return pb.RouterMessage(submit=_submit_to_pb(message))
        case Cancel():
            return pb.RouterMessage(cancel=pb.Cancel(**fields_of(message)))
        case Adopt():
            return pb.RouterMessage(adopt=pb.Adopt(**fields_of(message)))
        case Find():
            return pb.RouterMessage(find=pb.Find(**fields_of(message)))
        case Waits():
            return pb.RouterMessage(waits=pb.Waits(**fields_of(message)))
        case DumpRequest():
            return pb.RouterMessage(dump=pb.DumpRequest())
        case RouterHello(router_id):
            return pb.RouterMessage(hello=pb.Hello(router_id=router_id))


MAX_KEY_BYTES = 64
MAX_JOB_LETTERS = 64
MAX_TICKET_BYTES = 256 << 10


def _check_key(key: bytes) -> None:
    if len(key) > MAX_KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes")


def _check_job(message: pb.Kept | pb.Waits) -> None:
    if not 0 < len(message.job) <= MAX_JOB_LETTERS or len(message.ticket) > MAX_TICKET_BYTES:
        raise ValueError(f"a job's name of {len(message.job)} letters, a ticket of {len(message.ticket)} bytes")


def _kept_from_pb(message: pb.Kept) -> Kept:
    _check_job(message)
    return from_fields(Kept, message)


def _submit_from_pb(submit: pb.Submit) -> Submit:
    migration = None
    if submit.HasField("migration"):
        moved = submit.migration
        migration = Migration(address_from_pb(moved.source), moved.request_id, moved.permit)
    _check_key(submit.key)
    return Submit(
        request_from_pb(submit.request),
        submit.generation,
        tuple(address_from_pb(address) for address in submit.prefill_workers),
        submit.remaining_s,
        submit.first_token_s,
        migration,
        hint_from_pb(submit.prefix) if submit.HasField("prefix") else None,
        submit.name,
        submit.key,
        _kept_from_pb(submit.kept) if submit.HasField("kept") else None,
        submit.cached_tokens,
    )


def router_message_from_pb(message: pb.RouterMessage) -> RouterMessage:
    """Raises ValueError for a message of a kind that this version does not know."""
    match message.WhichOneof("message"):
        case "submit":
            return _submit_from_pb(message.submit)
        case "cancel":
            return from_fields(Cancel, message.cancel)
        case "adopt":
            _check_key(message.adopt.key)
            return from_fields(Adopt, message.adopt)
        case "find":
            if message.find.ends and len(message.find.job) > MAX_JOB_LETTERS:  # it would be relayed
                raise ValueError(f"a job's name of {len(message.find.job)} letters")
            return from_fields(Find, message.find)
        case "waits":
            _check_job(message.waits)
            return from_fields(Waits, message.waits)
        case "dump":
            return DumpRequest()
        case "hello":
            return RouterHello(message.hello.router_id)
        case other:
            raise ValueError(f"a router message of kind {other!r} is not known")
