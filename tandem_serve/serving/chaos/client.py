"""A client that gets whole completions out of a cluster whose routers and connections may die at any moment.

Inside the cluster a stream survives the loss of its primary or drafter by itself. What nobody can survive for a client
is the loss of the process that it is connected to. It then asks again, with what it has got as part of the prompt and
the same seed: noise belongs to positions, so the text goes on with the very token that was due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import openai

_RETRY_INTERVAL_S = 0.1
_GAP_S = 0.25  # shorter pauses between two events are not remembered


@dataclass(frozen=True, slots=True)
class Order:
    """One completion to get. Its length is fixed: end-of-text is ignored."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    block_length: int | None = None  # None: the cluster's


@dataclass(slots=True)
class Delivery:
    """What came of an order."""

    token_ids: list[int] = field(default_factory=list)
    is_accepted: bool = False  # something came
    last_token_s: float = field(default_factory=time.monotonic)  # at first, when it was ordered
    num_resumptions: int = 0  # after it had been cut off with some of its text
    num_refusals: int = 0  # told to come back later (429)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # pauses: from, to, on time.monotonic's clock


class ResumingClient:
    """Completes orders at an OpenAI endpoint."""

    def __init__(self, url: str, *, patience_s: float = 120.0) -> None:
        """patience_s: how long an order may go without a new token before it is given up."""
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=patience_s)
        self._patience_s = patience_s

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, order: Order) -> Delivery:
        """The whole completion; a part of it where the cluster stays dead for longer than this client is patient."""
        delivery = Delivery()
        while len(delivery.token_ids) < order.max_tokens:
            if (now := time.monotonic()) - delivery.last_token_s > self._patience_s:
                delivery.gaps.append((delivery.last_token_s, now))
                break
            num_before = len(delivery.token_ids)
            try:
                await self._stream(order, delivery)
            except openai.RateLimitError as error:
                delivery.num_refusals += 1
                await asyncio.sleep(float(error.response.headers.get("retry-after", 1)))
            except (openai.APIError, httpx.HTTPError):  # the connection, a router that has gone, or an error event
                await asyncio.sleep(_RETRY_INTERVAL_S)
            if num_before < len(delivery.token_ids) < order.max_tokens:
                delivery.num_resumptions += 1
        return delivery

    async def _stream(self, order: Order, delivery: Delivery) -> None:
        """One attempt at what is missing, perhaps cut short."""
        stream = await self._client.completions.create(
            model="",
            prompt=[*order.prompt_token_ids, *delivery.token_ids],
            max_tokens=order.max_tokens - len(delivery.token_ids),
            temperature=order.temperature,
            seed=order.seed,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True, "block_length": order.block_length},
        )
        async for chunk in stream:
            extra = chunk.choices[0].model_extra or {}
            if extra["token_ids"]:
                now = time.monotonic()
                if now - delivery.last_token_s > _GAP_S:
                    delivery.gaps.append((delivery.last_token_s, now))
                delivery.last_token_s = now
                delivery.is_accepted = True
                delivery.token_ids.extend(extra["token_ids"])


def longest_gap_s(deliveries: Sequence[Delivery], start: float, end: float) -> float:
    """The longest pause of any stream that touches this stretch of time."""
    gaps = [to - since for delivery in deliveries for since, to in delivery.gaps if since < end and to > start]
    return max(gaps, default=0.0)
