"""A TCP proxy that can be slow, stalled or cut: the network between the pools, as bad as it gets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Weather:
    """What the link does to bytes on it."""

    delay_s: float = 0.0  # each piece waits so long, one after the other
    is_stalled: bool = False  # nothing gets through, and nobody is told
    is_cut: bool = False  # connections break, and new ones are refused


FAIR = Weather()


class BadLink:
    """Forwards connections to target, both host:port, from a thread of its own, while the process lives."""

    def __init__(self, target: str, host: str = "127.0.0.1") -> None:
        self._target_host, _, port = target.rpartition(":")
        self._target_port = int(port)
        self._weather = FAIR
        self._writers: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Event()
        self._clearing: asyncio.TimerHandle | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="bad link", daemon=True).start()
        starting = asyncio.start_server(self._accept, host, 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def set_weather(self, weather: Weather, seconds: float | None = None) -> None:
        """From now on, and after so many seconds fair again. Any thread."""
        self._loop.call_soon_threadsafe(self._set_weather, weather, seconds)

    def _set_weather(self, weather: Weather, seconds: float | None = None) -> None:
        if self._clearing is not None:
            self._clearing.cancel()
        self._clearing = None if seconds is None else self._loop.call_later(seconds, self._set_weather, FAIR)
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()
        if weather.is_cut:
            for writer in self._writers:
                writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._weather.is_cut:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection(self._target_host, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        if self._weather.is_cut:  # by now
            writer.transport.abort()
            back.transport.abort()
            return
        ends = {writer, back}
        self._writers |= ends
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        finally:
            self._writers -= ends

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                await asyncio.sleep(self._weather.delay_s)
                while self._weather.is_stalled:
                    await self._changed.wait()
                writer.write(piece)
                await writer.drain()
        writer.close()
