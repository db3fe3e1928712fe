"""Checks of single message fields. Every number that arrives goes through one of these, with its limit beside it.

They raise InvalidRequest naming the field by its path in the message ("commands[3].extend.token_ids").
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tandem_serve.errors import InvalidRequest
from tandem_serve.tracing import TraceContext

MAX_ID_BYTES = 128  # request and sequence ids
MAX_NAME_BYTES = 512  # models, addresses, fingerprints
MAX_POSITION = (1 << 31) - 1  # fits every integer type on the way
MAX_TOKEN_IDS = 1 << 22  # in one list; message sizes bind long before

M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes) -> M:
    """Bytes as a message; gRPC's own deserializer would answer INTERNAL, as if the fault were ours."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"not a {kind.DESCRIPTOR.full_name}: {error}") from error


def text(value: str, field: str, *, max_bytes: int, required: bool = True) -> str:
    if required and not value:
        raise InvalidRequest(f"{field} must not be empty", field=field)
    if len(value) > max_bytes or len(value.encode()) > max_bytes:
        raise InvalidRequest(f"{field} is longer than {max_bytes} bytes", field=field)
    return value


def integer(value: int, field: str, *, low: int = 0, high: int) -> int:
    if not low <= value <= high:
        raise InvalidRequest(f"{field} must be from {low} to {high}, not {value}", field=field)
    return value


def real(
    value: float, field: str, *, low: float, high: float, without_low: bool = False, without_high: bool = False
) -> float:
    """Checks low <= value <= high, without an end where so told. Never lets NaN or infinity through."""
    inside = math.isfinite(value) and low <= value <= high
    if not inside or (without_low and value == low) or (without_high and value == high):
        span = f"{'(' if without_low else '['}{low:g}, {high:g}{')' if without_high else ']'}"
        raise InvalidRequest(f"{field} must be in {span}, not {value:g}", field=field)
    return value


def traceparent(value: str) -> str | None:
    """A trace context, which is nobody's fault where it is none: what is malformed means not traced, as for the W3C."""
    return value if TraceContext.parse(value) is not None else None


def token_ids(values: Iterable[int], field: str, *, vocab_size: int, required: bool = False) -> tuple[int, ...]:
    ids = tuple(values)
    if required and not ids:
        raise InvalidRequest(f"{field} must not be empty", field=field)
    if len(ids) > MAX_TOKEN_IDS:
        raise InvalidRequest(f"{field} has {len(ids)} ids, at most {MAX_TOKEN_IDS} are taken", field=field)
    if ids and max(ids) >= vocab_size:
        raise InvalidRequest(f"{field} has id {max(ids)}, the vocabulary has {vocab_size}", field=field)
    return ids
