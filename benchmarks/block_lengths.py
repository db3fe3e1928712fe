"""The router's block lengths against fixed ones, at a running cluster and several loads.

    tandem-serve up deployments/demo.yaml       # with router: {speculation: {adapts: true}}, in the same terminal
    python benchmarks/block_lengths.py --loads 1,4,16,32 --fixed 0,2,5 --seconds 10 --json runs/block-lengths.json

Each load: the contenders by turns, `--turns` times; nobody streams, so that clients cost little. Before each load the
router gets a few seconds to find out. Tokens a second, medians of the turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tandem_serve.bench.prompts import load_prompts
from tandem_serve.models.folder import load_tokenizer, resolve_folder

ROUTER = "router"


Prompts = Sequence[tuple[int, ...]]


async def throughput(
    url: str, prompts: Prompts, num_clients: int, seconds: float, max_tokens: int, block_length: int | None
) -> float:
    """Tokens a second that so many clients get, each with one request at a time. None: the router decides."""
    tokens = 0
    started = time.monotonic()

    async def client(number: int, api: httpx.AsyncClient) -> None:
        nonlocal tokens
        turn = 0
        while time.monotonic() - started < seconds:
            body: dict[str, Any] = {
                "model": "",
                "prompt": prompts[(number + turn * num_clients) % len(prompts)],
                "max_tokens": max_tokens,
                "temperature": 0.8 * (number % 2),
                "seed": turn,
                "ignore_eos": True,
                "speculation": {} if block_length is None else {"block_length": block_length},
            }
            answer = await api.post(f"{url}/v1/completions", json=body)
            tokens += answer.raise_for_status().json()["usage"]["completion_tokens"]
            turn += 1

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as api:
        await asyncio.gather(*(client(number, api) for number in range(num_clients)))
    return tokens / (time.monotonic() - started)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    model = resolve_folder(options.model)
    prompts = load_prompts("heldout", "", 64, load_tokenizer(model), model, 64)
    contenders = {f"fixed-{length}": length for length in options.fixed} | {ROUTER: None}
    loads = {}
    for load in options.loads:
        await throughput(options.url, prompts, load, options.settle_seconds, options.max_tokens, None)
        runs: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.turns):
            for name, length in contenders.items():
                runs[name].append(
                    await throughput(options.url, prompts, load, options.seconds, options.max_tokens, length)
                )
        rates = {name: round(statistics.median(values), 1) for name, values in runs.items()}
        best = max(rate for name, rate in rates.items() if name != ROUTER)
        loads[str(load)] = {"tokens_per_s": rates, "router_to_best_fixed": round(rates[ROUTER] / best, 3)}
        print(load, json.dumps(loads[str(load)]), flush=True)
    return loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="models/demo/primary", help="whose held-out text prompts are cut from")
    parser.add_argument("--loads", type=_integers, default=[1, 4, 16, 32])
    parser.add_argument("--fixed", type=_integers, default=[0, 2, 5])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--settle-seconds", type=float, default=5.0)
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
