"""X-Request-Id, in and out: one name for a request in the client's logs and in those of every pool.

Ray Serve gives every HTTP request an id and echoes it. A router without Ray does the same with `EchoRequestId`.
"""

from __future__ import annotations

import re
import secrets
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_ACCEPTED = re.compile(r"[A-Za-z0-9._:@=+/-]{1,64}")


def request_id_of(given: str | None) -> str:
    """The client's id, or one of our own where there is none or one that no log should have to hold."""
    return given if given is not None and _ACCEPTED.fullmatch(given) else uuid.uuid4().hex


def sequence_prefix(response_id: str) -> str:
    """What the ids of a request's sequences begin with: clients may use an id twice, engines may not."""
    return f"{response_id}-{secrets.token_hex(4)}"


class EchoRequestId:
    """ASGI middleware: every request has an id, and every response tells it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        headers[HEADER] = request_id = request_id_of(headers.get(HEADER))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
