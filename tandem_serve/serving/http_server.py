"""An ASGI application on a TCP port, on the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp


class HttpServer:
    """Serves from `start` to `stop`. Leaves signals to its owner."""

    def __init__(self, app: ASGIApp, *, host: str, port: int) -> None:
        """Binds the port (0: any free one), so that `port` is known. Raises OSError where it is taken."""
        self._socket = socket.create_server((host, port), backlog=1024)
        # Connections inherit it. asyncio sets it only on sockets that were made with IPPROTO_TCP spelt out; without it
        # every response waits 40 ms for the client's delayed acknowledgement of its headers.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await self._server.is_up.wait()

    async def stop(self, drain_timeout_s: float) -> None:
        """Takes no new connections and gives running responses the time to end."""
        if self._task is None:
            return
        self._server.should_exit = True
        try:
            await asyncio.wait_for(asyncio.shield(self._task), drain_timeout_s)
        except TimeoutError:
            self._server.force_exit = True
            await self._task


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()
