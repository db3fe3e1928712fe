from tandem_serve.rpc._gen.tandem.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlockPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_POLICY_UNSPECIFIED: _ClassVar[BlockPolicy]
    BLOCK_POLICY_FIXED: _ClassVar[BlockPolicy]
    BLOCK_POLICY_ENTROPY: _ClassVar[BlockPolicy]
    BLOCK_POLICY_ROUTER: _ClassVar[BlockPolicy]
    BLOCK_POLICY_OPTIMAL: _ClassVar[BlockPolicy]
BLOCK_POLICY_UNSPECIFIED: BlockPolicy
BLOCK_POLICY_FIXED: BlockPolicy
BLOCK_POLICY_ENTROPY: BlockPolicy
BLOCK_POLICY_ROUTER: BlockPolicy
BLOCK_POLICY_OPTIMAL: BlockPolicy

class DraftRequest(_message.Message):
    __slots__ = ("hello", "commands")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    hello: PrimaryHello
    commands: DraftCommands
    def __init__(self, hello: _Optional[_Union[PrimaryHello, _Mapping]] = ..., commands: _Optional[_Union[DraftCommands, _Mapping]] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("hello", "events")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    hello: DrafterHello
    events: DraftEvents
    def __init__(self, hello: _Optional[_Union[DrafterHello, _Mapping]] = ..., events: _Optional[_Union[DraftEvents, _Mapping]] = ...) -> None: ...

class PrimaryHello(_message.Message):
    __slots__ = ("wire_version", "primary")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    primary: PrimaryModel
    def __init__(self, wire_version: _Optional[int] = ..., primary: _Optional[_Union[PrimaryModel, _Mapping]] = ...) -> None: ...

class PrimaryModel(_message.Message):
    __slots__ = ("model", "fingerprint", "tokenizer_hash", "vocab_size", "hidden_size", "num_layers", "max_model_len")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., tokenizer_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., max_model_len: _Optional[int] = ...) -> None: ...

class DrafterHello(_message.Message):
    __slots__ = ("wire_version", "model", "fingerprint", "primary_fingerprint", "tokenizer_hash", "vocab_size", "taps", "primary_hidden_size", "max_block_length", "max_model_len", "representation_dtype", "initial_credit_bytes", "max_message_bytes")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    REPRESENTATION_DTYPE_FIELD_NUMBER: _ClassVar[int]
    INITIAL_CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    model: str
    fingerprint: str
    primary_fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    taps: _containers.RepeatedScalarFieldContainer[int]
    primary_hidden_size: int
    max_block_length: int
    max_model_len: int
    representation_dtype: _tensor_pb2.DataType
    initial_credit_bytes: int
    max_message_bytes: int
    def __init__(self, wire_version: _Optional[int] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., primary_fingerprint: _Optional[str] = ..., tokenizer_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., taps: _Optional[_Iterable[int]] = ..., primary_hidden_size: _Optional[int] = ..., max_block_length: _Optional[int] = ..., max_model_len: _Optional[int] = ..., representation_dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., initial_credit_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class DraftCommands(_message.Message):
    __slots__ = ("commands",)
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    commands: _containers.RepeatedCompositeFieldContainer[DraftCommand]
    def __init__(self, commands: _Optional[_Iterable[_Union[DraftCommand, _Mapping]]] = ...) -> None: ...

class DraftCommand(_message.Message):
    __slots__ = ("open", "extend", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: OpenSequence
    extend: ExtendSequence
    close: CloseSequence
    def __init__(self, open: _Optional[_Union[OpenSequence, _Mapping]] = ..., extend: _Optional[_Union[ExtendSequence, _Mapping]] = ..., close: _Optional[_Union[CloseSequence, _Mapping]] = ...) -> None: ...

class OpenSequence(_message.Message):
    __slots__ = ("sequence_id", "incarnation", "sampling")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    incarnation: int
    sampling: Sampling
    def __init__(self, sequence_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class ExtendSequence(_message.Message):
    __slots__ = ("sequence_id", "incarnation", "round", "start_position", "token_ids", "representations", "next_token_id", "block_length", "traceparent", "stopping", "num_unverified")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REPRESENTATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    NUM_UNVERIFIED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    incarnation: int
    round: int
    start_position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    representations: _tensor_pb2.Tensor
    next_token_id: int
    block_length: int
    traceparent: str
    stopping: StoppingRule
    num_unverified: int
    def __init__(self, sequence_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., round: _Optional[int] = ..., start_position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., representations: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., next_token_id: _Optional[int] = ..., block_length: _Optional[int] = ..., traceparent: _Optional[str] = ..., stopping: _Optional[_Union[StoppingRule, _Mapping]] = ..., num_unverified: _Optional[int] = ...) -> None: ...

class StoppingRule(_message.Message):
    __slots__ = ("policy", "threshold", "keep_threshold", "step_cost")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    KEEP_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_FIELD_NUMBER: _ClassVar[int]
    policy: BlockPolicy
    threshold: float
    keep_threshold: float
    step_cost: float
    def __init__(self, policy: _Optional[_Union[BlockPolicy, str]] = ..., threshold: _Optional[float] = ..., keep_threshold: _Optional[float] = ..., step_cost: _Optional[float] = ...) -> None: ...

class CloseSequence(_message.Message):
    __slots__ = ("sequence_id", "incarnation")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    incarnation: int
    def __init__(self, sequence_id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class DraftEvents(_message.Message):
    __slots__ = ("blocks", "rejections", "credit_granted_bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[DraftBlock]
    rejections: _containers.RepeatedCompositeFieldContainer[SequenceRejected]
    credit_granted_bytes: int
    def __init__(self, blocks: _Optional[_Iterable[_Union[DraftBlock, _Mapping]]] = ..., rejections: _Optional[_Iterable[_Union[SequenceRejected, _Mapping]]] = ..., credit_granted_bytes: _Optional[int] = ...) -> None: ...

class DraftBlock(_message.Message):
    __slots__ = ("sequence_id", "incarnation", "round", "draft_token_ids", "draft_time_us")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TIME_US_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    incarnation: int
    round: int
    draft_token_ids: _containers.RepeatedScalarFieldContainer[int]
    draft_time_us: int
    def __init__(self, sequence_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., round: _Optional[int] = ..., draft_token_ids: _Optional[_Iterable[int]] = ..., draft_time_us: _Optional[int] = ...) -> None: ...

class SequenceRejected(_message.Message):
    __slots__ = ("sequence_id", "incarnation", "message", "retryable")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    incarnation: int
    message: str
    retryable: bool
    def __init__(self, sequence_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...
