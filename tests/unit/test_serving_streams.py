"""merge: several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from tandem_serve.serving.streams import merge


class Source:
    """A stream of numbers that knows whether it was closed."""

    def __init__(self, numbers: list[int], *, error: Exception | None = None, endless: bool = False) -> None:
        self._numbers, self._error, self._endless = numbers, error, endless
        self.is_open = False
        self.opened = asyncio.Event()

    async def stream(self) -> AsyncGenerator[int, None]:
        self.is_open = True
        self.opened.set()
        try:
            for number in self._numbers:
                await asyncio.sleep(0)
                yield number
            if self._error is not None:
                raise self._error
            if self._endless:
                await asyncio.Event().wait()
        finally:
            self.is_open = False


@pytest.mark.parametrize("lengths", [[3], [2, 5], [0, 0, 4]])
async def test_every_item_arrives_in_its_stream_s_order(lengths: list[int]) -> None:
    sources = [Source(list(range(length))) for length in lengths]
    items = [item async for item in merge([source.stream() for source in sources])]
    for index, length in enumerate(lengths):
        assert [number for i, number in items if i == index] == list(range(length))


@pytest.mark.parametrize("others", [0, 2])
async def test_an_error_ends_all_streams(others: int) -> None:
    sources = [Source([1], error=ValueError("broken")), *(Source([1], endless=True) for _ in range(others))]
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([source.stream() for source in sources]):
            pass
    assert not any(source.is_open for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_closes_every_stream(count: int) -> None:
    sources = [Source([1], endless=True) for _ in range(count)]
    merged = merge([source.stream() for source in sources])
    for _ in range(count):
        await anext(merged)
    assert all(source.is_open for source in sources)
    await merged.aclose()
    assert not any(source.is_open for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_cancelling_the_reader_closes_every_stream(count: int) -> None:
    sources = [Source([], endless=True) for _ in range(count)]
    merged = merge([source.stream() for source in sources])
    reader = asyncio.ensure_future(anext(merged))
    await asyncio.gather(*(source.opened.wait() for source in sources))
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert not any(source.is_open for source in sources)
