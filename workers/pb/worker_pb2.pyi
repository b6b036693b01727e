from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "logit_bias", "bad_words", "stop", "stop_token_ids", "ignore_eos", "include_stop", "skip_special_tokens", "logprobs", "prompt_logprobs", "grammar", "allowed_token_ids", "thinking", "logprob_token_ids")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenIds]
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    include_stop: bool
    skip_special_tokens: bool
    logprobs: int
    prompt_logprobs: int
    grammar: str
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    thinking: ThinkingBudget
    logprob_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., bad_words: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., include_stop: bool = ..., skip_special_tokens: bool = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., grammar: _Optional[str] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., thinking: _Optional[_Union[ThinkingBudget, _Mapping]] = ..., logprob_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ThinkingBudget(_message.Message):
    __slots__ = ("num_tokens", "end_token_id", "closing", "start_token_id")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CLOSING_FIELD_NUMBER: _ClassVar[int]
    START_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    end_token_id: int
    closing: _containers.RepeatedScalarFieldContainer[int]
    start_token_id: int
    def __init__(self, num_tokens: _Optional[int] = ..., end_token_id: _Optional[int] = ..., closing: _Optional[_Iterable[int]] = ..., start_token_id: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "params", "choice_index", "replay_token_ids", "priority", "traceparent", "cache_salt", "constrained")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    REPLAY_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    params: SamplingParams
    choice_index: int
    replay_token_ids: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    traceparent: str
    cache_salt: int
    constrained: SamplingParams
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ..., choice_index: _Optional[int] = ..., replay_token_ids: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ..., traceparent: _Optional[str] = ..., cache_salt: _Optional[int] = ..., constrained: _Optional[_Union[SamplingParams, _Mapping]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "top", "rank")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    rank: int
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., rank: _Optional[int] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("first", "num_top", "token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first: int
    num_top: int
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    top_ids: bytes
    top_logprobs: bytes
    def __init__(self, first: _Optional[int] = ..., num_top: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., ranks: _Optional[bytes] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class HandoffReport(_message.Message):
    __slots__ = ("prefill_worker", "decode_worker", "transport", "kv_bytes", "transfer_s", "prefill_s", "attempts", "wait_s", "exposed_s", "resends", "degradations", "recovery", "queue_s")
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    RESENDS_FIELD_NUMBER: _ClassVar[int]
    DEGRADATIONS_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    prefill_worker: str
    decode_worker: str
    transport: str
    kv_bytes: int
    transfer_s: float
    prefill_s: float
    attempts: int
    wait_s: float
    exposed_s: float
    resends: int
    degradations: int
    recovery: str
    queue_s: float
    def __init__(self, prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., transport: _Optional[str] = ..., kv_bytes: _Optional[int] = ..., transfer_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., attempts: _Optional[int] = ..., wait_s: _Optional[float] = ..., exposed_s: _Optional[float] = ..., resends: _Optional[int] = ..., degradations: _Optional[int] = ..., recovery: _Optional[str] = ..., queue_s: _Optional[float] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("request_id", "position", "token_ids", "text", "logprobs", "finish_reason", "stop_text", "stop_token_id", "refusal", "message", "cached_tokens", "handoff", "prompt_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish_reason: str
    stop_text: str
    stop_token_id: int
    refusal: str
    message: str
    cached_tokens: int
    handoff: HandoffReport
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptScores]
    def __init__(self, request_id: _Optional[str] = ..., position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_text: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., refusal: _Optional[str] = ..., message: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., handoff: _Optional[_Union[HandoffReport, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptScores, _Mapping]]] = ...) -> None: ...

class WorkerAddress(_message.Message):
    __slots__ = ("worker_id", "generation", "target")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    generation: int
    target: str
    def __init__(self, worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., target: _Optional[str] = ...) -> None: ...

class PrefixHint(_message.Message):
    __slots__ = ("peer", "num_blocks")
    PEER_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    peer: WorkerAddress
    num_blocks: int
    def __init__(self, peer: _Optional[_Union[WorkerAddress, _Mapping]] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request", "generation", "prefill_workers", "remaining_s", "first_token_s", "migration", "prefix", "name", "key", "kept", "cached_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKERS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: Request
    generation: int
    prefill_workers: _containers.RepeatedCompositeFieldContainer[WorkerAddress]
    remaining_s: float
    first_token_s: float
    migration: Migration
    prefix: PrefixHint
    name: str
    key: bytes
    kept: Kept
    cached_tokens: int
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., generation: _Optional[int] = ..., prefill_workers: _Optional[_Iterable[_Union[WorkerAddress, _Mapping]]] = ..., remaining_s: _Optional[float] = ..., first_token_s: _Optional[float] = ..., migration: _Optional[_Union[Migration, _Mapping]] = ..., prefix: _Optional[_Union[PrefixHint, _Mapping]] = ..., name: _Optional[str] = ..., key: _Optional[bytes] = ..., kept: _Optional[_Union[Kept, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Kept(_message.Message):
    __slots__ = ("job", "num_requests", "ticket", "is_background", "owner")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    IS_BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    job: str
    num_requests: int
    ticket: bytes
    is_background: bool
    owner: int
    def __init__(self, job: _Optional[str] = ..., num_requests: _Optional[int] = ..., ticket: _Optional[bytes] = ..., is_background: bool = ..., owner: _Optional[int] = ...) -> None: ...

class Migration(_message.Message):
    __slots__ = ("source", "request_id", "permit")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    source: WorkerAddress
    request_id: str
    permit: bytes
    def __init__(self, source: _Optional[_Union[WorkerAddress, _Mapping]] = ..., request_id: _Optional[str] = ..., permit: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "lets_go")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LETS_GO_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    lets_go: bool
    def __init__(self, request_id: _Optional[str] = ..., lets_go: bool = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("name", "request_id", "position", "key", "joins")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    JOINS_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    position: int
    key: bytes
    joins: bool
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ..., position: _Optional[int] = ..., key: _Optional[bytes] = ..., joins: bool = ...) -> None: ...

class Find(_message.Message):
    __slots__ = ("number", "job", "ends", "relays")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    RELAYS_FIELD_NUMBER: _ClassVar[int]
    number: int
    job: str
    ends: bool
    relays: bool
    def __init__(self, number: _Optional[int] = ..., job: _Optional[str] = ..., ends: bool = ..., relays: bool = ...) -> None: ...

class Waits(_message.Message):
    __slots__ = ("job", "num_requests", "ticket")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    job: str
    num_requests: int
    ticket: bytes
    def __init__(self, job: _Optional[str] = ..., num_requests: _Optional[int] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class DumpRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "dump", "adopt", "find", "waits", "number")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DUMP_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    FIND_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    cancel: Cancel
    dump: DumpRequest
    adopt: Adopt
    find: Find
    waits: Waits
    number: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., dump: _Optional[_Union[DumpRequest, _Mapping]] = ..., adopt: _Optional[_Union[Adopt, _Mapping]] = ..., find: _Optional[_Union[Find, _Mapping]] = ..., waits: _Optional[_Union[Waits, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_waiting", "num_running", "num_transferring", "waiting_prefill_tokens", "num_free_blocks", "num_blocks", "step_s", "step_decodes", "step_context", "step_prompt_tokens", "step_prompt_context")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERRING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    STEP_DECODES_FIELD_NUMBER: _ClassVar[int]
    STEP_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    STEP_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_PROMPT_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_running: int
    num_transferring: int
    waiting_prefill_tokens: int
    num_free_blocks: int
    num_blocks: int
    step_s: float
    step_decodes: int
    step_context: int
    step_prompt_tokens: int
    step_prompt_context: int
    def __init__(self, num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., num_transferring: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., step_s: _Optional[float] = ..., step_decodes: _Optional[int] = ..., step_context: _Optional[int] = ..., step_prompt_tokens: _Optional[int] = ..., step_prompt_context: _Optional[int] = ...) -> None: ...

class KvEvent(_message.Message):
    __slots__ = ("sequence", "stored", "removed", "reset", "tiers")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    reset: bool
    tiers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence: _Optional[int] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ..., reset: bool = ..., tiers: _Optional[_Iterable[int]] = ...) -> None: ...

class RequestLimits(_message.Message):
    __slots__ = ("stop_strings", "stop_characters", "stop_token_ids", "bad_words", "bad_word_tokens", "logit_bias", "allowed_token_ids", "logprobs")
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    stop_strings: int
    stop_characters: int
    stop_token_ids: int
    bad_words: int
    bad_word_tokens: int
    logit_bias: int
    allowed_token_ids: int
    logprobs: int
    def __init__(self, stop_strings: _Optional[int] = ..., stop_characters: _Optional[int] = ..., stop_token_ids: _Optional[int] = ..., bad_words: _Optional[int] = ..., bad_word_tokens: _Optional[int] = ..., logit_bias: _Optional[int] = ..., allowed_token_ids: _Optional[int] = ..., logprobs: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "fingerprint", "vocab_size", "max_model_len", "block_size", "limits", "grammars")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    vocab_size: int
    max_model_len: int
    block_size: int
    limits: RequestLimits
    grammars: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., limits: _Optional[_Union[RequestLimits, _Mapping]] = ..., grammars: _Optional[str] = ...) -> None: ...

class Counter(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "host", "pid", "epoch", "is_alive", "shares_memory")
    RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IS_ALIVE_FIELD_NUMBER: _ClassVar[int]
    SHARES_MEMORY_FIELD_NUMBER: _ClassVar[int]
    rank: int
    host: str
    pid: int
    epoch: int
    is_alive: bool
    shares_memory: bool
    def __init__(self, rank: _Optional[int] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., epoch: _Optional[int] = ..., is_alive: bool = ..., shares_memory: bool = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "generation", "role", "model", "load", "pid", "host", "kv_block_bytes", "counters", "is_draining", "ranks", "is_rebuilding", "max_num_seqs", "max_batch_tokens", "num_routers")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    IS_REBUILDING_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUTERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    generation: int
    role: str
    model: ModelInfo
    load: Load
    pid: int
    host: str
    kv_block_bytes: int
    counters: _containers.RepeatedCompositeFieldContainer[Counter]
    is_draining: bool
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    is_rebuilding: bool
    max_num_seqs: int
    max_batch_tokens: int
    num_routers: int
    def __init__(self, worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., role: _Optional[str] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., kv_block_bytes: _Optional[int] = ..., counters: _Optional[_Iterable[_Union[Counter, _Mapping]]] = ..., is_draining: bool = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., is_rebuilding: bool = ..., max_num_seqs: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., num_routers: _Optional[int] = ...) -> None: ...

class FoundRequest(_message.Message):
    __slots__ = ("name", "num_prompt_tokens", "num_tokens", "cached_tokens", "finish_reason", "is_whole")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    IS_WHOLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_prompt_tokens: int
    num_tokens: int
    cached_tokens: int
    finish_reason: str
    is_whole: bool
    def __init__(self, name: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., finish_reason: _Optional[str] = ..., is_whole: bool = ...) -> None: ...

class Found(_message.Message):
    __slots__ = ("number", "requests", "num_requests", "ticket", "is_waiting")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    IS_WAITING_FIELD_NUMBER: _ClassVar[int]
    number: int
    requests: _containers.RepeatedCompositeFieldContainer[FoundRequest]
    num_requests: int
    ticket: bytes
    is_waiting: bool
    def __init__(self, number: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[FoundRequest, _Mapping]]] = ..., num_requests: _Optional[int] = ..., ticket: _Optional[bytes] = ..., is_waiting: bool = ...) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("generation", "outputs", "load", "kv_events", "status", "number", "heard", "found", "ended_jobs")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HEARD_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ENDED_JOBS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    load: Load
    kv_events: _containers.RepeatedCompositeFieldContainer[KvEvent]
    status: WorkerStatus
    number: int
    heard: int
    found: _containers.RepeatedCompositeFieldContainer[Found]
    ended_jobs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, generation: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., kv_events: _Optional[_Iterable[_Union[KvEvent, _Mapping]]] = ..., status: _Optional[_Union[WorkerStatus, _Mapping]] = ..., number: _Optional[int] = ..., heard: _Optional[int] = ..., found: _Optional[_Iterable[_Union[Found, _Mapping]]] = ..., ended_jobs: _Optional[_Iterable[str]] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("num_blocks", "num_layers", "num_kv_heads", "block_size", "head_dim", "dtype", "itemsize")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ITEMSIZE_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    itemsize: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., block_size: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., itemsize: _Optional[int] = ...) -> None: ...

class RunningSubject(_message.Message):
    __slots__ = ("request_id", "permit")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    permit: bytes
    def __init__(self, request_id: _Optional[str] = ..., permit: _Optional[bytes] = ...) -> None: ...

class PrefixSubject(_message.Message):
    __slots__ = ("hashes", "token_ids", "parent")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    parent: int
    def __init__(self, hashes: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., parent: _Optional[int] = ...) -> None: ...

class OpenHandoff(_message.Message):
    __slots__ = ("transfer_id", "target", "source_generation", "model_fingerprint", "layout", "prompt", "running", "prefix", "first_block", "transports", "num_blocks", "host", "prefix_hint", "takes_batches")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HINT_FIELD_NUMBER: _ClassVar[int]
    TAKES_BATCHES_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    target: WorkerAddress
    source_generation: int
    model_fingerprint: str
    layout: KvLayout
    prompt: Request
    running: RunningSubject
    prefix: PrefixSubject
    first_block: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    num_blocks: int
    host: str
    prefix_hint: PrefixHint
    takes_batches: bool
    def __init__(self, transfer_id: _Optional[str] = ..., target: _Optional[_Union[WorkerAddress, _Mapping]] = ..., source_generation: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., prompt: _Optional[_Union[Request, _Mapping]] = ..., running: _Optional[_Union[RunningSubject, _Mapping]] = ..., prefix: _Optional[_Union[PrefixSubject, _Mapping]] = ..., first_block: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., num_blocks: _Optional[int] = ..., host: _Optional[str] = ..., prefix_hint: _Optional[_Union[PrefixHint, _Mapping]] = ..., takes_batches: bool = ...) -> None: ...

class PieceAck(_message.Message):
    __slots__ = ("pieces",)
    PIECES_FIELD_NUMBER: _ClassVar[int]
    pieces: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pieces: _Optional[_Iterable[int]] = ...) -> None: ...

class UseTransport(_message.Message):
    __slots__ = ("transport", "epoch")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    transport: str
    epoch: int
    def __init__(self, transport: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class ReleaseHandoff(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelHandoff(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class HandoffDown(_message.Message):
    __slots__ = ("transfer_id", "generation", "open", "use", "ack", "release", "cancel", "number")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    generation: int
    open: OpenHandoff
    use: UseTransport
    ack: PieceAck
    release: ReleaseHandoff
    cancel: CancelHandoff
    number: int
    def __init__(self, transfer_id: _Optional[str] = ..., generation: _Optional[int] = ..., open: _Optional[_Union[OpenHandoff, _Mapping]] = ..., use: _Optional[_Union[UseTransport, _Mapping]] = ..., ack: _Optional[_Union[PieceAck, _Mapping]] = ..., release: _Optional[_Union[ReleaseHandoff, _Mapping]] = ..., cancel: _Optional[_Union[CancelHandoff, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("transport", "data")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    transport: str
    data: bytes
    def __init__(self, transport: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class HandoffAccepted(_message.Message):
    __slots__ = ("offers", "layout", "host")
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    layout: KvLayout
    host: str
    def __init__(self, offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., host: _Optional[str] = ...) -> None: ...

class KvPiece(_message.Message):
    __slots__ = ("piece", "block", "first_layer", "num_layers", "source_block", "checksum")
    PIECE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCK_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    piece: int
    block: int
    first_layer: int
    num_layers: int
    source_block: int
    checksum: int
    def __init__(self, piece: _Optional[int] = ..., block: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., source_block: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class KvPieces(_message.Message):
    __slots__ = ("pieces", "epoch")
    PIECES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    pieces: _containers.RepeatedCompositeFieldContainer[KvPiece]
    epoch: int
    def __init__(self, pieces: _Optional[_Iterable[_Union[KvPiece, _Mapping]]] = ..., epoch: _Optional[int] = ...) -> None: ...

class TransportBroken(_message.Message):
    __slots__ = ("epoch", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("token_id", "logprob", "num_pieces", "cached_tokens", "prefill_s")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    NUM_PIECES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: TokenLogprob
    num_pieces: int
    cached_tokens: int
    prefill_s: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[_Union[TokenLogprob, _Mapping]] = ..., num_pieces: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class SequenceMoved(_message.Message):
    __slots__ = ("known_token_ids", "num_computed", "num_pieces")
    KNOWN_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    NUM_PIECES_FIELD_NUMBER: _ClassVar[int]
    known_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_computed: int
    num_pieces: int
    def __init__(self, known_token_ids: _Optional[_Iterable[int]] = ..., num_computed: _Optional[int] = ..., num_pieces: _Optional[int] = ...) -> None: ...

class PrefixDone(_message.Message):
    __slots__ = ("num_blocks", "num_pieces")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PIECES_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_pieces: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_pieces: _Optional[int] = ...) -> None: ...

class HandoffRefused(_message.Message):
    __slots__ = ("refusal", "message")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    message: str
    def __init__(self, refusal: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class HandoffUp(_message.Message):
    __slots__ = ("transfer_id", "generation", "accepted", "pieces", "done", "refused", "broken", "cancel", "moved", "prefix_done", "number", "then")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DONE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    THEN_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    generation: int
    accepted: HandoffAccepted
    pieces: KvPieces
    done: PrefillDone
    refused: HandoffRefused
    broken: TransportBroken
    cancel: CancelHandoff
    moved: SequenceMoved
    prefix_done: PrefixDone
    number: int
    then: _containers.RepeatedCompositeFieldContainer[HandoffUp]
    def __init__(self, transfer_id: _Optional[str] = ..., generation: _Optional[int] = ..., accepted: _Optional[_Union[HandoffAccepted, _Mapping]] = ..., pieces: _Optional[_Union[KvPieces, _Mapping]] = ..., done: _Optional[_Union[PrefillDone, _Mapping]] = ..., refused: _Optional[_Union[HandoffRefused, _Mapping]] = ..., broken: _Optional[_Union[TransportBroken, _Mapping]] = ..., cancel: _Optional[_Union[CancelHandoff, _Mapping]] = ..., moved: _Optional[_Union[SequenceMoved, _Mapping]] = ..., prefix_done: _Optional[_Union[PrefixDone, _Mapping]] = ..., number: _Optional[int] = ..., then: _Optional[_Iterable[_Union[HandoffUp, _Mapping]]] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("role", "generation")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    role: str
    generation: int
    def __init__(self, role: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class SetDrainingRequest(_message.Message):
    __slots__ = ("is_draining", "generation")
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    is_draining: bool
    generation: int
    def __init__(self, is_draining: bool = ..., generation: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
