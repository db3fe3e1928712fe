"""Our exceptions as gRPC statuses and back."""

from __future__ import annotations

from unittest.mock import MagicMock

import grpc
import pytest
from ray.serve.grpc_util import RayServegRPCContext

from tandem_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelMismatch,
    Overloaded,
    RequestAborted,
    TandemError,
    Unavailable,
)
from tandem_serve.rpc.inference_server import name_call
from tandem_serve.rpc.statuses import error_from, set_status, status_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("temperature: too hot", field="prompt[2] ü"), grpc.StatusCode.INVALID_ARGUMENT),
        (InvalidRequest("no single field"), grpc.StatusCode.INVALID_ARGUMENT),
        (ModelMismatch("taps"), grpc.StatusCode.FAILED_PRECONDITION),
        (Overloaded("full", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Unavailable("nobody"), grpc.StatusCode.UNAVAILABLE),
        (RequestAborted("gone"), grpc.StatusCode.CANCELLED),
    ],
)
def test_an_exception_survives_the_wire(error: TandemError, code: grpc.StatusCode) -> None:
    status = status_of(error)
    assert status.code is code
    assert all(value.isascii() for _, value in status.trailing_metadata)
    again = error_from(status.code, status.details, status.trailing_metadata)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_a_bug_is_logged_here_and_says_nothing_there(caplog: pytest.LogCaptureFixture) -> None:
    status = status_of(ValueError("secret"))
    assert status.code is grpc.StatusCode.INTERNAL
    assert "secret" not in status.details
    assert "secret" in caplog.text


def test_long_messages_are_cut() -> None:
    assert len(status_of(InvalidRequest("x" * 100_000, field="y" * 100_000)).details) < 4096


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_other_codes_mean_try_elsewhere(code: grpc.StatusCode) -> None:
    error = error_from(code, "boom", None)
    assert isinstance(error, Unavailable)
    assert code.name in str(error)


@pytest.mark.parametrize("retry_after", ["soon", "-3", ""])
def test_a_strange_retry_after_does_no_harm(retry_after: str) -> None:
    error = error_from(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [("retry-after", retry_after)])
    assert isinstance(error, Overloaded)
    assert 0 <= error.retry_after_s <= 1


def test_a_status_is_put_on_serve_s_own_context_and_leaves_the_call_its_name() -> None:
    call = MagicMock()
    call.invocation_metadata.return_value = [("x-request-id", "order-66")]
    call.trailing_metadata.return_value = ()
    context = RayServegRPCContext(call)
    context.set_trailing_metadata([("request_id", "of Serve")])
    assert name_call(context) == "order-66"
    set_status(context, Overloaded("full", retry_after_s=3))
    assert (context.code(), context.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert context.trailing_metadata() == [
        ("request_id", "of Serve"),
        ("x-request-id", "order-66"),
        ("retry-after", "3"),
    ]
