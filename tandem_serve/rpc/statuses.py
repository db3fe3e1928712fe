"""Our exceptions as gRPC statuses, and back: the one place where the two meet.

The message travels as the status details; what else an exception carries travels in trailing metadata.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol
from urllib.parse import quote, unquote

import grpc

from tandem_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelMismatch,
    Overloaded,
    PermissionDenied,
    RequestAborted,
    TandemError,
    Unauthenticated,
    Unavailable,
)

RETRY_AFTER_KEY = "retry-after"  # seconds, as in HTTP
FIELD_KEY = "invalid-field"  # percent-encoded: metadata is ASCII
REQUEST_ID_KEY = "x-request-id"  # of a call's metadata, and of what its answer ends with
MAX_DETAILS_BYTES = 2048  # headers over 8 KiB are refused by default; percent-encoding may treble this

_CODES: tuple[tuple[type[TandemError], grpc.StatusCode], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (ModelMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (RequestAborted, grpc.StatusCode.CANCELLED),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Status:
    """A gRPC status, ready to be sent."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str], ...] = ()


class StatusContext(Protocol):
    """The part of a servicer context that carries a status; Ray Serve's gRPC context has it too."""

    def set_code(self, code: Any) -> None: ...

    def set_details(self, details: str) -> None: ...

    def trailing_metadata(self) -> Any: ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


def status_of(error: BaseException) -> Status:
    """The status that tells a caller of this error. Anything that is not ours is a bug: logged here, INTERNAL there."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            metadata = []
            if isinstance(error, Overloaded):
                metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"))
            if isinstance(error, InvalidRequest) and error.field:
                metadata.append((FIELD_KEY, quote(error.field[:256])))
            return Status(code, str(error)[:MAX_DETAILS_BYTES], tuple(metadata))
    logger.error("unexpected error while serving a call", exc_info=error)
    return Status(grpc.StatusCode.INTERNAL, "internal error; the server's log says more")


def set_status(context: StatusContext, error: BaseException) -> None:
    """Puts an error's status on a call that is about to fail. Its name, if it has one, stays."""
    status = status_of(error)
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata(_with_name_of(context, status))


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """Ends an asyncio call with an error's status. Its name, if it has one, stays."""
    status = status_of(error)
    await context.abort(status.code, status.details, tuple(_with_name_of(context, status)))
    raise AssertionError("abort returned")  # it never does; the stubs do not say so


def _with_name_of(context: Any, status: Status) -> list[tuple[str, str]]:
    """A list, as Ray Serve's context wants it."""
    name = [(key, value) for key, value in context.trailing_metadata() or () if key == REQUEST_ID_KEY]
    return [*name, *status.trailing_metadata]


def error_from(code: grpc.StatusCode, details: str | None, trailing_metadata: Iterable[Any] | None) -> TandemError:
    """The exception behind a failed call. What has no counterpart is Unavailable: another replica may do better."""
    message = details or code.name
    metadata = {str(key): str(value) for key, value in trailing_metadata or ()}
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
        return InvalidRequest(message, field=unquote(metadata.get(FIELD_KEY, "")))
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return ModelMismatch(message)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(message)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(message, retry_after_s=_seconds(metadata.get(RETRY_AFTER_KEY)))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(message)
    if code is grpc.StatusCode.CANCELLED:
        return RequestAborted(message)
    return Unavailable(message if code is grpc.StatusCode.UNAVAILABLE else f"{code.name}: {message}")


def _seconds(value: str | None) -> float:
    try:
        return max(0.0, float(value or 1.0))
    except ValueError:
        return 1.0
