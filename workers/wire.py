"""Translates between protobuf messages and the values of workers.*; decides nothing.

Each value has a pair: `x_to_pb` and `x_from_pb`. `x_from_pb` raises ValueError where a name (a role, a finish reason)
is unknown. Floats of a LogitBias and of logprobs travel in 32 bits.
"""

from __future__ import annotations

from workers.client import Cancel, DumpRequest, Hello, Migration, RouterMessage, Submit, WorkerFrame
from workers.errors import InvariantViolated, Refusal
from workers.kv_transfer.memory import KvLayout
from workers.pb import worker_pb2 as pb
from workers.request import FinishReason, HandoffReport, Output, Request, SamplingParams, TokenLogprob
from workers.status import KvEvent, Load, ModelInfo, PrefixHint, RankStatus, Role, Tier, WorkerAddress, WorkerStatus


def params_to_pb(params: SamplingParams) -> pb.SamplingParams:
    """Raises InvariantViolated when the seed is not concrete."""
    if params.seed is None:
        raise InvariantViolated("a request leaves the router with a concrete seed")
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        logit_bias=[pb.LogitBias(token_id=token, bias=bias) for token, bias in params.logit_bias],
        bad_words=[pb.TokenIds(token_ids=words) for words in params.bad_words],
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        include_stop=params.include_stop,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def params_from_pb(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        seed=message.seed,
        logit_bias=tuple((pair.token_id, pair.bias) for pair in message.logit_bias),
        bad_words=tuple(tuple(words.token_ids) for words in message.bad_words),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        skip_special_tokens=message.skip_special_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def request_to_pb(request: Request) -> pb.Request:
    return pb.Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        params=params_to_pb(request.params),
        choice_index=request.choice_index,
        replay_token_ids=request.replay_token_ids,
        priority=request.priority,
        traceparent=request.traceparent,
    )


def request_from_pb(message: pb.Request) -> Request:
    return Request(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        params=params_from_pb(message.params),
        choice_index=message.choice_index,
        replay_token_ids=tuple(message.replay_token_ids),
        priority=message.priority,
        traceparent=message.traceparent,
    )


def token_logprob_to_pb(entry: TokenLogprob | None) -> pb.TokenLogprob:
    """None (the first prompt token has no logprob) travels as `absent`."""
    if entry is None:
        return pb.TokenLogprob(absent=True)
    top = [pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top]
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=top, rank=entry.rank)


def token_logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((entry.token_id, entry.logprob) for entry in message.top)
    rank = message.rank if message.HasField("rank") else None
    return TokenLogprob(message.token_id, message.logprob, top, rank)


def optional_logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob | None:
    return None if message.absent else token_logprob_from_pb(message)


def handoff_report_to_pb(report: HandoffReport) -> pb.HandoffReport:
    return pb.HandoffReport(
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        transport=report.transport,
        kv_bytes=report.kv_bytes,
        transfer_s=report.transfer_s,
        prefill_s=report.prefill_s,
        attempts=report.attempts,
        wait_s=report.wait_s,
        exposed_s=report.exposed_s,
        resends=report.resends,
        degradations=report.degradations,
        recovery=report.recovery,
        queue_s=report.queue_s,
    )


def handoff_report_from_pb(message: pb.HandoffReport) -> HandoffReport:
    return HandoffReport(
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        transport=message.transport,
        kv_bytes=message.kv_bytes,
        transfer_s=message.transfer_s,
        prefill_s=message.prefill_s,
        attempts=message.attempts,
        wait_s=message.wait_s,
        exposed_s=message.exposed_s,
        resends=message.resends,
        degradations=message.degradations,
        recovery=message.recovery,
        queue_s=message.queue_s,
    )


def output_to_pb(output: Output) -> pb.Output:
    """Runs once a token and sequence: fields that are mostly empty are set only when they are not."""
    message = pb.Output(
        request_id=output.request_id, position=output.position, token_ids=output.token_ids, text=output.text
    )
    if output.logprobs:
        message.logprobs.extend([token_logprob_to_pb(entry) for entry in output.logprobs])
    if output.finish_reason is not None:
        message.finish_reason = output.finish_reason.value
        message.message = output.message
        if isinstance(output.stop_reason, str):
            message.stop_text = output.stop_reason
        elif output.stop_reason is not None:
            message.stop_token_id = output.stop_reason
        if output.refusal is not None:
            message.refusal = output.refusal.value
    if output.cached_tokens:
        message.cached_tokens = output.cached_tokens
    if output.prompt_logprobs is not None:
        message.has_prompt_logprobs = True
        message.prompt_logprobs.extend([token_logprob_to_pb(entry) for entry in output.prompt_logprobs])
    if output.handoff is not None:
        message.handoff.CopyFrom(handoff_report_to_pb(output.handoff))
    return message


def output_from_pb(message: pb.Output) -> Output:
    finish = message.finish_reason
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    if message.has_prompt_logprobs:
        prompt_logprobs = tuple(optional_logprob_from_pb(entry) for entry in message.prompt_logprobs)
    return Output(
        request_id=message.request_id,
        position=message.position,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(token_logprob_from_pb(entry) for entry in message.logprobs) if message.logprobs else (),
        finish_reason=FinishReason(finish) if finish else None,
        stop_reason=_stop_reason(message) if finish else None,
        refusal=refusal_from_name(message.refusal) if finish and message.refusal else None,
        message=message.message if finish else "",
        cached_tokens=message.cached_tokens,
        prompt_logprobs=prompt_logprobs,
        handoff=handoff_report_from_pb(message.handoff) if message.HasField("handoff") else None,
    )


def _stop_reason(message: pb.Output) -> str | int | None:
    if message.HasField("stop_text"):
        return message.stop_text
    return message.stop_token_id if message.HasField("stop_token_id") else None


def refusal_from_name(name: str) -> Refusal:
    """A name that a newer peer made up counts as INTERNAL, so that a rolling upgrade cannot break a stream."""
    try:
        return Refusal(name)
    except ValueError:
        return Refusal.INTERNAL


def address_to_pb(address: WorkerAddress) -> pb.WorkerAddress:
    return pb.WorkerAddress(worker_id=address.worker_id, generation=address.generation, target=address.target)


def address_from_pb(message: pb.WorkerAddress) -> WorkerAddress:
    return WorkerAddress(message.worker_id, message.generation, message.target)


def hint_to_pb(hint: PrefixHint) -> pb.PrefixHint:
    return pb.PrefixHint(peer=address_to_pb(hint.peer), num_blocks=hint.num_blocks)


def hint_from_pb(message: pb.PrefixHint) -> PrefixHint:
    return PrefixHint(address_from_pb(message.peer), message.num_blocks)


def load_to_pb(load: Load) -> pb.Load:
    return pb.Load(
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_transferring=load.num_transferring,
        waiting_prefill_tokens=load.waiting_prefill_tokens,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
        step_s=load.step_s,
    )


def load_from_pb(message: pb.Load) -> Load:
    return Load(
        message.num_waiting,
        message.num_running,
        message.num_transferring,
        message.waiting_prefill_tokens,
        message.num_free_blocks,
        message.num_blocks,
        message.step_s,
    )


def kv_event_to_pb(event: KvEvent) -> pb.KvEvent:
    return pb.KvEvent(
        sequence=event.sequence, stored=event.stored, removed=event.removed, reset=event.reset, tiers=event.tiers
    )


def kv_event_from_pb(message: pb.KvEvent) -> KvEvent:
    """Raises ValueError for a tier that this version does not know."""
    tiers = tuple([Tier(tier) for tier in message.tiers])
    return KvEvent(message.sequence, tuple(message.stored), tuple(message.removed), message.reset, tiers)


def model_to_pb(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(
        name=model.name,
        fingerprint=model.fingerprint,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        block_size=model.block_size,
    )


def model_from_pb(message: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(message.name, message.fingerprint, message.vocab_size, message.max_model_len, message.block_size)


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
        ranks=[
            pb.RankStatus(
                rank=rank.rank,
                host=rank.host,
                pid=rank.pid,
                epoch=rank.epoch,
                is_alive=rank.is_alive,
                shares_memory=rank.shares_memory,
            )
            for rank in status.ranks
        ],
        is_rebuilding=status.is_rebuilding,
    )


def status_from_pb(message: pb.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        worker_id=message.worker_id,
        generation=message.generation,
        role=Role(message.role),
        model=model_from_pb(message.model),
        load=load_from_pb(message.load),
        pid=message.pid,
        host=message.host,
        kv_block_bytes=message.kv_block_bytes,
        counters=tuple((counter.name, counter.value) for counter in message.counters),
        is_draining=message.is_draining,
        ranks=tuple(
            RankStatus(rank.rank, rank.host, rank.pid, rank.epoch, rank.is_alive, rank.shares_memory)
            for rank in message.ranks
        ),
        is_rebuilding=message.is_rebuilding,
    )


def layout_to_pb(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        num_blocks=layout.num_blocks,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        block_size=layout.block_size,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        itemsize=layout.itemsize,
    )


def layout_from_pb(message: pb.KvLayout) -> KvLayout:
    return KvLayout(
        message.num_blocks,
        message.num_layers,
        message.num_kv_heads,
        message.block_size,
        message.head_dim,
        message.dtype,
        message.itemsize,
    )


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
    return WorkerFrame(
        generation=message.generation,
        outputs=tuple([output_from_pb(output) for output in message.outputs]),
        load=load_from_pb(message.load) if message.HasField("load") else None,
        kv_events=tuple([kv_event_from_pb(event) for event in message.kv_events]),
        status=status_from_pb(message.status) if message.HasField("status") else None,
    )


def router_message_to_pb(message: RouterMessage) -> pb.RouterMessage:
    match message:
        case Submit(request, generation, prefill_workers, remaining_s, first_token_s, migration, prefix):
            submit = pb.Submit(
                request=request_to_pb(request),
                generation=generation,
                prefill_workers=[address_to_pb(address) for address in prefill_workers],
                remaining_s=remaining_s,
                first_token_s=first_token_s,
                prefix=hint_to_pb(prefix) if prefix is not None else None,
            )
            if migration is not None:
                submit.migration.CopyFrom(
                    pb.Migration(source=address_to_pb(migration.source), request_id=migration.request_id)
                )
            return pb.RouterMessage(submit=submit)
        case Cancel(request_id):
            return pb.RouterMessage(cancel=pb.Cancel(request_id=request_id))
        case DumpRequest():
            return pb.RouterMessage(dump=pb.DumpRequest())
        case Hello(router_id):
            return pb.RouterMessage(hello=pb.Hello(router_id=router_id))


def router_message_from_pb(message: pb.RouterMessage) -> RouterMessage:
    """Raises ValueError for a message of a kind that this version does not know."""
    match message.WhichOneof("message"):
        case "submit":
            submit = message.submit
            addresses = tuple(address_from_pb(address) for address in submit.prefill_workers)
            migration = None
            if submit.HasField("migration"):
                migration = Migration(address_from_pb(submit.migration.source), submit.migration.request_id)
            request = request_from_pb(submit.request)
            prefix = hint_from_pb(submit.prefix) if submit.HasField("prefix") else None
            times = (submit.remaining_s, submit.first_token_s)
            return Submit(request, submit.generation, addresses, *times, migration, prefix)
        case "cancel":
            return Cancel(message.cancel.request_id)
        case "dump":
            return DumpRequest()
        case "hello":
            return Hello(message.hello.router_id)
        case other:
            raise ValueError(f"a router message of kind {other!r} is not known")
