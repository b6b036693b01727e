from workers.pb import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Ints(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("rank", "size", "pid", "host", "fingerprint")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    size: int
    pid: int
    host: str
    fingerprint: str
    def __init__(self, rank: _Optional[int] = ..., size: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("num_blocks", "slots", "pool_pid", "pool_fd", "pool_bytes", "pool_nonce")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    POOL_PID_FIELD_NUMBER: _ClassVar[int]
    POOL_FD_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_NONCE_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    slots: _containers.RepeatedCompositeFieldContainer[Ints]
    pool_pid: int
    pool_fd: int
    pool_bytes: int
    pool_nonce: str
    def __init__(self, num_blocks: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[Ints, _Mapping]]] = ..., pool_pid: _Optional[int] = ..., pool_fd: _Optional[int] = ..., pool_bytes: _Optional[int] = ..., pool_nonce: _Optional[str] = ...) -> None: ...

class Declined(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("fingerprint", "expert_bytes", "shares_memory", "offers_direct", "kernels")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARES_MEMORY_FIELD_NUMBER: _ClassVar[int]
    OFFERS_DIRECT_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    expert_bytes: int
    shares_memory: bool
    offers_direct: bool
    kernels: str
    def __init__(self, fingerprint: _Optional[str] = ..., expert_bytes: _Optional[int] = ..., shares_memory: bool = ..., offers_direct: bool = ..., kernels: _Optional[str] = ...) -> None: ...

class Form(_message.Message):
    __slots__ = ("epoch", "store_host", "store_port", "slots", "role", "generation", "direct")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORE_HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    store_host: str
    store_port: int
    slots: _containers.RepeatedCompositeFieldContainer[Ints]
    role: str
    generation: int
    direct: bool
    def __init__(self, epoch: _Optional[int] = ..., store_host: _Optional[str] = ..., store_port: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[Ints, _Mapping]]] = ..., role: _Optional[str] = ..., generation: _Optional[int] = ..., direct: bool = ...) -> None: ...

class Formed(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("epoch", "message")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    message: str
    def __init__(self, epoch: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("epoch", "number", "role", "generation", "halves", "wants_load", "moved_layer", "moved_slots", "num_prefill", "num_decode", "tail")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HALVES_FIELD_NUMBER: _ClassVar[int]
    WANTS_LOAD_FIELD_NUMBER: _ClassVar[int]
    MOVED_LAYER_FIELD_NUMBER: _ClassVar[int]
    MOVED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    number: int
    role: str
    generation: int
    halves: bool
    wants_load: bool
    moved_layer: int
    moved_slots: _containers.RepeatedScalarFieldContainer[int]
    num_prefill: int
    num_decode: int
    tail: bytes
    def __init__(self, epoch: _Optional[int] = ..., number: _Optional[int] = ..., role: _Optional[str] = ..., generation: _Optional[int] = ..., halves: bool = ..., wants_load: bool = ..., moved_layer: _Optional[int] = ..., moved_slots: _Optional[_Iterable[int]] = ..., num_prefill: _Optional[int] = ..., num_decode: _Optional[int] = ..., tail: _Optional[bytes] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("epoch", "number", "step_s", "generation", "sent_bytes", "load", "tail")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    number: int
    step_s: float
    generation: int
    sent_bytes: int
    load: _containers.RepeatedCompositeFieldContainer[Ints]
    tail: bytes
    def __init__(self, epoch: _Optional[int] = ..., number: _Optional[int] = ..., step_s: _Optional[float] = ..., generation: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., load: _Optional[_Iterable[_Union[Ints, _Mapping]]] = ..., tail: _Optional[bytes] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("epoch", "message", "is_broken")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IS_BROKEN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    message: str
    is_broken: bool
    def __init__(self, epoch: _Optional[int] = ..., message: _Optional[str] = ..., is_broken: bool = ...) -> None: ...

class GetBlocks(_message.Message):
    __slots__ = ("blocks", "epoch", "number")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    number: int
    def __init__(self, blocks: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class PutBlocks(_message.Message):
    __slots__ = ("blocks", "epoch", "number", "tail")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    number: int
    tail: bytes
    def __init__(self, blocks: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., number: _Optional[int] = ..., tail: _Optional[bytes] = ...) -> None: ...

class Blocks(_message.Message):
    __slots__ = ("number", "tail")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    number: int
    tail: bytes
    def __init__(self, number: _Optional[int] = ..., tail: _Optional[bytes] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "declined", "ready", "form", "formed", "abort", "step", "done", "failed", "get_blocks", "put_blocks", "blocks", "beat", "stop")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    FORMED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    GET_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PUT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    declined: Declined
    ready: Ready
    form: Form
    formed: Formed
    abort: Abort
    step: Step
    done: Done
    failed: Failed
    get_blocks: GetBlocks
    put_blocks: PutBlocks
    blocks: Blocks
    beat: Beat
    stop: Stop
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., declined: _Optional[_Union[Declined, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., form: _Optional[_Union[Form, _Mapping]] = ..., formed: _Optional[_Union[Formed, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., get_blocks: _Optional[_Union[GetBlocks, _Mapping]] = ..., put_blocks: _Optional[_Union[PutBlocks, _Mapping]] = ..., blocks: _Optional[_Union[Blocks, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Edits(_message.Message):
    __slots__ = ("bias_ids", "biases", "banned_ids", "seen_ids", "seen_counts", "allowed")
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    BANNED_IDS_FIELD_NUMBER: _ClassVar[int]
    SEEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    bias_ids: bytes
    biases: bytes
    banned_ids: bytes
    seen_ids: bytes
    seen_counts: bytes
    allowed: bytes
    def __init__(self, bias_ids: _Optional[bytes] = ..., biases: _Optional[bytes] = ..., banned_ids: _Optional[bytes] = ..., seen_ids: _Optional[bytes] = ..., seen_counts: _Optional[bytes] = ..., allowed: _Optional[bytes] = ...) -> None: ...

class Spec(_message.Message):
    __slots__ = ("params", "choice_index", "position", "forced_token_id", "edits")
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    FORCED_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    params: _worker_pb2.SamplingParams
    choice_index: int
    position: int
    forced_token_id: int
    edits: Edits
    def __init__(self, params: _Optional[_Union[_worker_pb2.SamplingParams, _Mapping]] = ..., choice_index: _Optional[int] = ..., position: _Optional[int] = ..., forced_token_id: _Optional[int] = ..., edits: _Optional[_Union[Edits, _Mapping]] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "start", "num_known", "blocks", "sample", "prompt_logprobs", "next_token_id")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUM_KNOWN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    token_ids: bytes
    start: int
    num_known: int
    blocks: bytes
    sample: Spec
    prompt_logprobs: int
    next_token_id: int
    def __init__(self, sequence_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., start: _Optional[int] = ..., num_known: _Optional[int] = ..., blocks: _Optional[bytes] = ..., sample: _Optional[_Union[Spec, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ..., next_token_id: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("prefill", "decode")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    prefill: _containers.RepeatedCompositeFieldContainer[Slice]
    decode: _containers.RepeatedCompositeFieldContainer[Slice]
    def __init__(self, prefill: _Optional[_Iterable[_Union[Slice, _Mapping]]] = ..., decode: _Optional[_Iterable[_Union[Slice, _Mapping]]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("sequence_id", "token_id", "logprob", "prompt_logprobs")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    token_id: int
    logprob: _worker_pb2.TokenLogprob
    prompt_logprobs: _worker_pb2.PromptScores
    def __init__(self, sequence_id: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[_Union[_worker_pb2.TokenLogprob, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_worker_pb2.PromptScores, _Mapping]] = ...) -> None: ...

class Results(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...
