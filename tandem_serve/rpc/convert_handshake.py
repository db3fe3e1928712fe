"""The two hellos of a drafting stream."""

from __future__ import annotations

from dataclasses import dataclass

from tandem_serve.errors import InvalidRequest, ModelMismatch
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2
from tandem_serve.rpc.convert_primary import (
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_VOCAB_SIZE,
    parse_primary_model,
    primary_model,
)
from tandem_serve.rpc.convert_tensor import DATA_TYPES, WIRE_DTYPES, WireDtype
from tandem_serve.types import MAX_BLOCK_LENGTH, DrafterInfo, PrimaryInfo

WIRE_VERSION = 1
MAX_CREDIT_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class DrafterTerms:
    """What a drafter offers, and how it wants to be spoken to."""

    info: DrafterInfo
    representation_dtype: WireDtype
    credit_bytes: int  # to start with
    max_message_bytes: int


def primary_hello(info: PrimaryInfo) -> drafting_pb2.DraftRequest:
    return drafting_pb2.DraftRequest(
        hello=drafting_pb2.PrimaryHello(wire_version=WIRE_VERSION, primary=primary_model(info))
    )


def parse_primary_hello(message: drafting_pb2.DraftRequest) -> PrimaryInfo:
    """Raises ModelMismatch for another wire version, InvalidRequest for anything malformed."""
    if message.WhichOneof("kind") != "hello":
        raise InvalidRequest("the first message of a stream must be a hello", field="kind")
    _check_version(message.hello.wire_version, "drafter", "primary")
    return parse_primary_model(message.hello.primary, "hello.primary")


def drafter_hello(terms: DrafterTerms) -> drafting_pb2.DraftResponse:
    info = terms.info
    hello = drafting_pb2.DrafterHello(
        wire_version=WIRE_VERSION,
        model=info.model,
        fingerprint=info.fingerprint,
        primary_fingerprint=info.primary_fingerprint,
        tokenizer_hash=info.tokenizer_hash,
        vocab_size=info.vocab_size,
        taps=info.taps,
        primary_hidden_size=info.primary_hidden_size,
        max_block_length=info.max_block_length,
        max_model_len=info.max_model_len,
        representation_dtype=DATA_TYPES[terms.representation_dtype],
        initial_credit_bytes=terms.credit_bytes,
        max_message_bytes=terms.max_message_bytes,
    )
    return drafting_pb2.DraftResponse(hello=hello)


def parse_drafter_hello(message: drafting_pb2.DraftResponse) -> DrafterTerms:
    """Raises ModelMismatch for another wire version, InvalidRequest for anything malformed."""
    if message.WhichOneof("kind") != "hello":
        raise InvalidRequest("the first answer of a stream must be a hello", field="kind")
    hello = message.hello
    _check_version(hello.wire_version, "primary", "drafter")
    if hello.representation_dtype not in WIRE_DTYPES:
        raise InvalidRequest(
            f"hello.representation_dtype {hello.representation_dtype} is unknown", field="hello.representation_dtype"
        )
    return DrafterTerms(
        info=_parse_drafter_info(hello),
        representation_dtype=WIRE_DTYPES[hello.representation_dtype],
        credit_bytes=fields.integer(
            hello.initial_credit_bytes, "hello.initial_credit_bytes", low=1, high=MAX_CREDIT_BYTES
        ),
        max_message_bytes=fields.integer(
            hello.max_message_bytes, "hello.max_message_bytes", low=1, high=MAX_CREDIT_BYTES
        ),
    )


def _parse_drafter_info(hello: drafting_pb2.DrafterHello) -> DrafterInfo:
    taps = tuple(hello.taps)
    if taps != tuple(sorted(set(taps))) or (taps and taps[-1] > MAX_LAYERS):
        raise InvalidRequest(f"hello.taps must ascend and be at most {MAX_LAYERS}, not {taps[:16]}", field="hello.taps")
    return DrafterInfo(
        model=_name(hello.model, "hello.model", required=False),
        fingerprint=_name(hello.fingerprint, "hello.fingerprint"),
        primary_fingerprint=_name(hello.primary_fingerprint, "hello.primary_fingerprint", required=False),
        tokenizer_hash=_name(hello.tokenizer_hash, "hello.tokenizer_hash"),
        vocab_size=fields.integer(hello.vocab_size, "hello.vocab_size", low=1, high=MAX_VOCAB_SIZE),
        taps=taps,
        primary_hidden_size=fields.integer(
            hello.primary_hidden_size, "hello.primary_hidden_size", low=1 if taps else 0, high=MAX_HIDDEN_SIZE
        ),
        max_block_length=fields.integer(hello.max_block_length, "hello.max_block_length", low=1, high=MAX_BLOCK_LENGTH),
        max_model_len=fields.integer(hello.max_model_len, "hello.max_model_len", low=1, high=fields.MAX_POSITION),
    )


def _name(value: str, field: str, *, required: bool = True) -> str:
    return fields.text(value, field, max_bytes=fields.MAX_NAME_BYTES, required=required)


def _check_version(theirs: int, we: str, they: str) -> None:
    if theirs != WIRE_VERSION:
        raise ModelMismatch(f"wire version: this {we} speaks {WIRE_VERSION}, the {they} {theirs}")
