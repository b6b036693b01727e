"""Translates what routers and workers say between protobuf messages and the values of workers.*; decides nothing.

Each value has a pair: `x_to_pb` and `x_from_pb`. `x_from_pb` raises ValueError where a name (a role, a finish reason)
is unknown.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import inf, isfinite

from workers.kv_memory.memory import KvLayout
from workers.limits import DEFAULT_LIMITS, RequestLimits
from workers.pb import worker_pb2 as pb
from workers.request import make_tuple
from workers.status import KvEvent, Load, ModelInfo, PrefixHint, RankStatus, Role, Tier, WorkerAddress, WorkerStatus
from workers.wire.attach import Adopt, Cancel, DumpRequest, Migration, RouterHello, RouterMessage, Submit, WorkerFrame
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


def frame_to_pb(frame: WorkerFrame) -> pb.WorkerFrame:
    message = pb.WorkerFrame(generation=frame.generation, outputs=[output_to_pb(output) for output in frame.outputs])
    if frame.load is not None:
        message.load.CopyFrom(load_to_pb(frame.load))
    if frame.kv_events:
        message.kv_events.extend([kv_event_to_pb(event) for event in frame.kv_events])
    if frame.status is not None:
        message.status.CopyFrom(status_to_pb(frame.status))
    return message


def frame_from_pb(message: pb.WorkerFrame) -> WorkerFrame:
    events = message.kv_events
    return WorkerFrame(
        message.generation,
        tuple([output_from_pb(output) for output in message.outputs]),
        load_from_pb(message.load) if message.HasField("load") else None,
        tuple([kv_event_from_pb(event) for event in events]) if events else (),
        status_from_pb(message.status) if message.HasField("status") else None,
    )


def router_message_to_pb(message: RouterMessage) -> pb.RouterMessage:
    match message:
        case Submit(request, generation, prefill_workers, remaining_s, first_token_s, migration, prefix, name, key):
            submit = pb.Submit(
                request=request_to_pb(request),
                generation=generation,
                prefill_workers=[address_to_pb(address) for address in prefill_workers],
                remaining_s=remaining_s,
                first_token_s=first_token_s,
                prefix=hint_to_pb(prefix) if prefix is not None else None,
                name=name,
                key=key,
            )
            if migration is not None:
                source = address_to_pb(migration.source)
                submit.migration.CopyFrom(
                    pb.Migration(source=source, request_id=migration.request_id, permit=migration.permit)
                )
            return pb.RouterMessage(submit=submit)
        case Cancel(request_id):
            return pb.RouterMessage(cancel=pb.Cancel(request_id=request_id))
        case Adopt(name, request_id, position, key):
            return pb.RouterMessage(adopt=pb.Adopt(name=name, request_id=request_id, position=position, key=key))
        case DumpRequest():
            return pb.RouterMessage(dump=pb.DumpRequest())
        case RouterHello(router_id):
            return pb.RouterMessage(hello=pb.Hello(router_id=router_id))


MAX_KEY_BYTES = 64


def _check_key(key: bytes) -> None:
    if len(key) > MAX_KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes")


def router_message_from_pb(message: pb.RouterMessage) -> RouterMessage:
    """Raises ValueError for a message of a kind that this version does not know."""
    match message.WhichOneof("message"):
        case "submit":
            submit = message.submit
            addresses = tuple(address_from_pb(address) for address in submit.prefill_workers)
            migration = None
            if submit.HasField("migration"):
                moved = submit.migration
                migration = Migration(address_from_pb(moved.source), moved.request_id, moved.permit)
            request = request_from_pb(submit.request)
            prefix = hint_from_pb(submit.prefix) if submit.HasField("prefix") else None
            times = (submit.remaining_s, submit.first_token_s)
            _check_key(submit.key)
            return Submit(request, submit.generation, addresses, *times, migration, prefix, submit.name, submit.key)
        case "cancel":
            return Cancel(message.cancel.request_id)
        case "adopt":
            adopt = message.adopt
            _check_key(adopt.key)
            return Adopt(adopt.name, adopt.request_id, adopt.position, adopt.key)
        case "dump":
            return DumpRequest()
        case "hello":
            return RouterHello(message.hello.router_id)
        case other:
            raise ValueError(f"a router message of kind {other!r} is not known")
