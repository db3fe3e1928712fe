"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, whatever went wrong and wherever."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tandem_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelMismatch,
    Overloaded,
    RequestAborted,
    TandemError,
    Unauthenticated,
    Unavailable,
)


class ApiError(Exception):
    """An error that knows its HTTP status. `param` names the offending parameter as the client spelt it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self._body = {"message": message, "type": type, "param": param, "code": code}

    def body(self) -> dict[str, Any]:
        return {"error": self._body}


def api_error(error: Exception) -> ApiError:
    """Any exception as an ApiError. What nobody foresaw becomes a 500 that gives nothing away."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, InvalidRequest):
        return ApiError(400, message, param=error.field or None, code="invalid_value")
    if isinstance(error, Unauthenticated):
        headers = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, code="invalid_api_key", headers=headers)
    if isinstance(error, ModelMismatch):
        return ApiError(409, message, type="conflict_error")
    if isinstance(error, Overloaded):
        retry_after = {"Retry-After": str(math.ceil(error.retry_after_s))}
        return ApiError(429, message, type="rate_limit_error", code="overloaded", headers=retry_after)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, message, type="timeout_error", code="deadline_exceeded")
    if isinstance(error, Unavailable):
        return ApiError(503, message, type="service_unavailable_error", code="unavailable")
    if isinstance(error, RequestAborted):
        return ApiError(499, message, type="request_aborted_error", code="aborted")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, code=_CODES.get(error.status_code))
    text = message if isinstance(error, TandemError) else "internal error; the server's log has the details"
    return ApiError(500, text, type="server_error", code="internal_error")


def error_response(error: Exception) -> JSONResponse:
    known = api_error(error)
    return JSONResponse(known.body(), known.status, headers=known.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of the app leave in OpenAI's shape: routes, methods and the unforeseen included."""

    def respond(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    for kind in (ApiError, TandemError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)


_CODES = {404: "not_found", 405: "method_not_allowed"}
