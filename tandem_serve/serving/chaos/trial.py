"""A trial: completions taken calmly, then again and again while faults are injected, and compared token for token."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from tandem_serve.config import ClusterConfig
from tandem_serve.models.folder import load_tokenizer, resolve_folder
from tandem_serve.serving.chaos.client import Delivery, Order, ResumingClient, longest_gap_s
from tandem_serve.serving.chaos.faults import FaultInjector
from tandem_serve.serving.chaos.recovery import Fault
from tandem_serve.serving.chaos.simulation import lower_priority, simulated_cluster

_PROMPTS = (
    "def read_lines(path):\n",
    "class Queue:\n    def __init__(self):\n",
    "import os\n\n\ndef walk(folder):\n",
    "for index, value in enumerate(values):\n",
    'async def main():\n    """Runs everything."""\n',
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrialSize:
    num_faults: int = 10
    num_streams: int = 16
    num_orders: int = 32  # different ones; streams take them by turns
    max_tokens: int = 120
    seed: int = 0


def run_trial(config: ClusterConfig, size: TrialSize, progress: Progress) -> dict[str, Any]:
    """Starts a simulated cluster, breaks it while it serves, and returns the report."""
    tokenizer = load_tokenizer(resolve_folder(config.primary.model))
    orders = _orders(size, lambda text: tuple(tokenizer.encode(text).ids))
    progress("starting nodes and pools")
    # Faults are injected from this thread, the main one: nodes that are started by another one cannot be ended well.
    with simulated_cluster(config) as simulation, ThreadPoolExecutor(1, "clients", lower_priority) as beside:
        progress("the calm run, without drafts")
        calm = asyncio.run(_calm_run(simulation.url, orders))
        crowd = _Crowd(simulation.url, orders)
        injector = FaultInjector(simulation, size.seed)
        started = time.monotonic()
        serving = beside.submit(lambda: asyncio.run(crowd.run(size.num_streams)))
        try:
            injector.inject_all(injector.schedule(size.num_faults), progress)
        finally:
            crowd.is_over = True
        taken = serving.result()
    return _report(orders, calm, taken, injector.faults, size, started)


def _orders(size: TrialSize, encode: Callable[[str], tuple[int, ...]]) -> list[Order]:
    """Greedy and sampled ones of several lengths."""
    rng = random.Random(size.seed)
    return [
        Order(
            prompt_token_ids=encode(f"# {index}\n{rng.choice(_PROMPTS)}"),
            max_tokens=rng.randint(size.max_tokens // 2, size.max_tokens),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            seed=rng.getrandbits(60),
        )
        for index in range(size.num_orders)
    ]


async def _calm_run(url: str, orders: Sequence[Order]) -> list[Delivery]:
    client = ResumingClient(url)
    calm = await asyncio.gather(*(client.complete(replace(order, block_length=0)) for order in orders))
    await client.close()
    return calm


class _Crowd:
    """Clients that take the orders by turns until `is_over`, which any thread may set; then they end what they have."""

    def __init__(self, url: str, orders: Sequence[Order]) -> None:
        self.is_over = False
        self._url, self._orders = url, orders
        self._numbers = itertools.count()

    async def run(self, num_streams: int) -> list[tuple[int, Delivery]]:
        """What was delivered, with the order's index."""
        client = ResumingClient(self._url)
        taken = await asyncio.gather(*(self._stream(client) for _ in range(num_streams)))
        await client.close()
        return [each for of_stream in taken for each in of_stream]

    async def _stream(self, client: ResumingClient) -> list[tuple[int, Delivery]]:
        taken = []
        while not self.is_over:
            index = next(self._numbers) % len(self._orders)
            taken.append((index, await client.complete(self._orders[index])))
        return taken


def _report(
    orders: Sequence[Order],
    calm: Sequence[Delivery],
    taken: Sequence[tuple[int, Delivery]],
    faults: Sequence[Fault],
    size: TrialSize,
    started: float,
) -> dict[str, Any]:
    deliveries = [delivery for _, delivery in taken]
    accepted = [(index, delivery) for index, delivery in taken if delivery.is_accepted]
    whole = [(index, each) for index, each in accepted if len(each.token_ids) == orders[index].max_tokens]
    return {
        "seed": size.seed,
        "num_streams": size.num_streams,
        "duration_s": round(time.monotonic() - started, 1),
        "accepted": len(accepted),
        "completed": len(whole),
        "changed": sum(each.token_ids != calm[index].token_ids[: len(each.token_ids)] for index, each in accepted),
        "calm_incomplete": sum(len(c.token_ids) != o.max_tokens for c, o in zip(calm, orders, strict=True)),
        "never_accepted": len(taken) - len(accepted),
        "resumed_by_client": sum(delivery.num_resumptions for delivery in deliveries),
        "refused": sum(delivery.num_refusals for delivery in deliveries),
        "tokens": sum(len(delivery.token_ids) for delivery in deliveries),
        "faults": [_fault(fault, deliveries, started) for fault in faults],
    }


def _fault(fault: Fault, deliveries: Sequence[Delivery], started: float) -> dict[str, Any]:
    end = fault.recovered if fault.recovered is not None else time.monotonic()
    return {
        "kind": fault.kind,
        "target": fault.target,
        "at_s": round(fault.started - started, 1),
        "recovery_s": None if fault.recovered is None else round(fault.recovered - fault.started, 1),
        "longest_pause_s": round(longest_gap_s(deliveries, fault.started, end), 1),
    }
