from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2 as _drafting_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodingMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECODING_MODE_UNSPECIFIED: _ClassVar[DecodingMode]
    DECODING_MODE_PLAIN: _ClassVar[DecodingMode]
    DECODING_MODE_SPECULATIVE: _ClassVar[DecodingMode]
    DECODING_MODE_TANDEM: _ClassVar[DecodingMode]
    DECODING_MODE_TANDEM_REPRESENTATIONS: _ClassVar[DecodingMode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]

class LinkState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LINK_STATE_UNSPECIFIED: _ClassVar[LinkState]
    LINK_STATE_CONNECTING: _ClassVar[LinkState]
    LINK_STATE_READY: _ClassVar[LinkState]
    LINK_STATE_REFUSED: _ClassVar[LinkState]
    LINK_STATE_CLOSED: _ClassVar[LinkState]
DECODING_MODE_UNSPECIFIED: DecodingMode
DECODING_MODE_PLAIN: DecodingMode
DECODING_MODE_SPECULATIVE: DecodingMode
DECODING_MODE_TANDEM: DecodingMode
DECODING_MODE_TANDEM_REPRESENTATIONS: DecodingMode
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
LINK_STATE_UNSPECIFIED: LinkState
LINK_STATE_CONNECTING: LinkState
LINK_STATE_READY: LinkState
LINK_STATE_REFUSED: LinkState
LINK_STATE_CLOSED: LinkState

class GenerateTokensRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "max_tokens", "stop_token_ids", "num_logprobs", "block_length", "drafter_address", "traceparent", "policy", "threshold", "mode")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _drafting_pb2.Sampling
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_logprobs: int
    block_length: int
    drafter_address: str
    traceparent: str
    policy: _drafting_pb2.BlockPolicy
    threshold: float
    mode: DecodingMode
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_drafting_pb2.Sampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_logprobs: _Optional[int] = ..., block_length: _Optional[int] = ..., drafter_address: _Optional[str] = ..., traceparent: _Optional[str] = ..., policy: _Optional[_Union[_drafting_pb2.BlockPolicy, str]] = ..., threshold: _Optional[float] = ..., mode: _Optional[_Union[DecodingMode, str]] = ...) -> None: ...

class GenerateTokensResponse(_message.Message):
    __slots__ = ("token_ids", "num_accepted_tokens", "num_draft_tokens", "logprobs", "finish_reason")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_accepted_tokens: int
    num_draft_tokens: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish_reason: FinishReason
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_accepted_tokens: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class GetPrimaryStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPrimaryStatusResponse(_message.Message):
    __slots__ = ("primary", "num_requests_running", "num_requests_waiting", "kv_cache_usage", "drafters")
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    primary: _drafting_pb2.PrimaryModel
    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    drafters: _containers.RepeatedCompositeFieldContainer[DrafterLinkStatus]
    def __init__(self, primary: _Optional[_Union[_drafting_pb2.PrimaryModel, _Mapping]] = ..., num_requests_running: _Optional[int] = ..., num_requests_waiting: _Optional[int] = ..., kv_cache_usage: _Optional[float] = ..., drafters: _Optional[_Iterable[_Union[DrafterLinkStatus, _Mapping]]] = ...) -> None: ...

class DrafterLinkStatus(_message.Message):
    __slots__ = ("address", "state", "num_sequences", "wait_s")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    address: str
    state: LinkState
    num_sequences: int
    wait_s: float
    def __init__(self, address: _Optional[str] = ..., state: _Optional[_Union[LinkState, str]] = ..., num_sequences: _Optional[int] = ..., wait_s: _Optional[float] = ...) -> None: ...

class DirectDraftingRequest(_message.Message):
    __slots__ = ("lengths",)
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    lengths: BlockLengths
    def __init__(self, lengths: _Optional[_Union[BlockLengths, _Mapping]] = ...) -> None: ...

class BlockLengths(_message.Message):
    __slots__ = ("by_batch", "probe_every")
    BY_BATCH_FIELD_NUMBER: _ClassVar[int]
    PROBE_EVERY_FIELD_NUMBER: _ClassVar[int]
    by_batch: _containers.RepeatedScalarFieldContainer[int]
    probe_every: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, by_batch: _Optional[_Iterable[int]] = ..., probe_every: _Optional[_Iterable[int]] = ...) -> None: ...

class DirectDraftingResponse(_message.Message):
    __slots__ = ("costs",)
    COSTS_FIELD_NUMBER: _ClassVar[int]
    costs: DraftingCosts
    def __init__(self, costs: _Optional[_Union[DraftingCosts, _Mapping]] = ...) -> None: ...

class DraftingCosts(_message.Message):
    __slots__ = ("verify", "draft", "tried", "right", "lengths")
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    TRIED_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    verify: _containers.RepeatedCompositeFieldContainer[CostPoint]
    draft: _containers.RepeatedCompositeFieldContainer[CostPoint]
    tried: _containers.RepeatedScalarFieldContainer[float]
    right: _containers.RepeatedScalarFieldContainer[float]
    lengths: BlockLengths
    def __init__(self, verify: _Optional[_Iterable[_Union[CostPoint, _Mapping]]] = ..., draft: _Optional[_Iterable[_Union[CostPoint, _Mapping]]] = ..., tried: _Optional[_Iterable[float]] = ..., right: _Optional[_Iterable[float]] = ..., lengths: _Optional[_Union[BlockLengths, _Mapping]] = ...) -> None: ...

class CostPoint(_message.Message):
    __slots__ = ("size", "seconds", "weight")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    size: float
    seconds: float
    weight: float
    def __init__(self, size: _Optional[float] = ..., seconds: _Optional[float] = ..., weight: _Optional[float] = ...) -> None: ...
