"""The router's block lengths against fixed ones, at a running cluster and several loads.

    tandem-serve up deployments/demo.yaml       # with router: {speculation: {adapts: true}}, in the same terminal
    python benchmarks/block_lengths.py --loads 1,4,16,32 --fixed 0,2,5 --json runs/block-lengths.json

Each load: the contenders by turns, `--turns` times, in any order; in a turn all get the same requests, for about
`--seconds` and three a client at least. Nobody streams, so that clients cost little. Before each load the router gets
a few seconds to find out; besides, it learns from what the fixed contenders do. Tokens a second are medians of the
turns, and so is the ratio: a machine is not equally fast from minute to minute, the contenders of a turn meet it alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tandem_serve.bench.prompts import load_prompts
from tandem_serve.models.folder import load_tokenizer, resolve_folder

ROUTER = "router"


Prompts = Sequence[tuple[int, ...]]


async def throughput(
    url: str, prompts: Prompts, num_clients: int, requests: Iterable[int], max_tokens: int, block_length: int | None
) -> float:
    """Tokens a second that so many clients get with these requests each, one at a time. None: the router decides."""
    tokens = 0
    started = time.monotonic()
    numbers = list(requests)

    async def client(number: int, api: httpx.AsyncClient) -> None:
        nonlocal tokens
        for request in numbers:
            body: dict[str, Any] = {
                "model": "",
                "prompt": prompts[(number + request * num_clients) % len(prompts)],
                "max_tokens": max_tokens,
                "temperature": 0.8 * (number % 2),
                "seed": request,
                "ignore_eos": True,
                "speculation": {} if block_length is None else {"block_length": block_length},
            }
            answer = await api.post(f"{url}/v1/completions", json=body)
            tokens += answer.raise_for_status().json()["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as api:
        await asyncio.gather(*(client(number, api) for number in range(num_clients)))
    return tokens / (time.monotonic() - started)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    model = resolve_folder(options.model)
    prompts = load_prompts("heldout", "", 64, load_tokenizer(model), model, 64)
    contenders = [*options.fixed, None]
    loads = {}
    for load in options.loads:

        async def rate(requests: Iterable[int], length: int | None, load: int = load) -> float:
            return await throughput(options.url, prompts, load, requests, options.max_tokens, length)

        settled_at = time.monotonic() + options.settle_seconds
        pace = await rate(range(1), None)
        while time.monotonic() < settled_at:
            pace = await rate(range(1), None)
        num_requests = max(round(pace * options.seconds / (load * options.max_tokens)), 3)
        runs: dict[int | None, list[float]] = {length: [] for length in contenders}
        for turn in range(options.turns):
            for length in random.Random(turn).sample(contenders, len(contenders)):
                runs[length].append(await rate(range(turn * num_requests, (turn + 1) * num_requests), length))
        loads[str(load)] = _compared(runs)
        print(load, json.dumps(loads[str(load)]), flush=True)
    return loads


def _compared(runs: Mapping[int | None, Sequence[float]]) -> dict[str, Any]:
    """The router (None) against the fixed length that is best in the median."""
    medians = {length: statistics.median(rates) for length, rates in runs.items()}
    best = max((length for length in runs if length is not None), key=medians.__getitem__)
    ratios = [router / fixed for router, fixed in zip(runs[None], runs[best], strict=True)]
    return {
        "tokens_per_s": {ROUTER if n is None else f"fixed-{n}": round(rate, 1) for n, rate in medians.items()},
        "router_to_best_fixed": round(statistics.median(ratios), 3),
        "by_turn": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="models/demo/primary", help="whose held-out text prompts are cut from")
    parser.add_argument("--loads", type=_integers, default=[1, 4, 16, 32])
    parser.add_argument("--fixed", type=_integers, default=[0, 2, 5])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each contender's part in a turn")
    parser.add_argument("--settle-seconds", type=float, default=12.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(measure(options))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
