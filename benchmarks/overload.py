"""Half load against ten times what a cluster can carry: inter-token latency, time to a 429, and memory.

    python benchmarks/overload.py --url http://127.0.0.1:8000 --seats 8 --seconds 30 --json runs/overload.json

Clients stream one completion after the other, each under an API key of its own, and begin within the first second; one
that is refused waits as long as it is told. They share a bare HTTP client, as they share the machine with the cluster.
Start both in one terminal: Linux shares cores out by terminals first, and clients in one of their own would wait.
`--seats` is the primaries' max_num_seqs in all. Resident memory is that of this machine's replicas.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tandem_serve.serving.planning import percentiles


@dataclass
class Tally:
    """What the clients of one phase saw."""

    gaps_s: list[float] = field(default_factory=list)  # between two events of a stream
    first_s: list[float] = field(default_factory=list)
    refusal_s: list[float] = field(default_factory=list)  # from sending to a 429
    completed: int = 0


class Crowd:
    """Clients of one phase."""

    def __init__(self, api: httpx.AsyncClient, seconds: float, max_tokens: int) -> None:
        self.tally = Tally()
        self._api, self._seconds, self._max_tokens = api, seconds, max_tokens

    async def run(self, num_clients: int) -> None:
        until = time.monotonic() + self._seconds
        await asyncio.gather(*(self._client(number, number / num_clients, until) for number in range(num_clients)))

    async def _client(self, number: int, starts_after_s: float, until: float) -> None:
        await asyncio.sleep(starts_after_s)
        turn = 0
        while time.monotonic() < until:
            retry_after_s = await self._complete(number, turn)
            await asyncio.sleep(min(retry_after_s, max(until - time.monotonic(), 0)))
            turn += 1

    async def _complete(self, number: int, turn: int) -> float:
        """One request. How long to wait before the next."""
        body = {
            "model": "",
            "prompt": f"# {number} {turn}\ndef function(",
            "max_tokens": self._max_tokens,
            "stream": True,
            "seed": turn,
            "ignore_eos": True,
        }
        tally, started = self.tally, time.monotonic()
        headers = {"Authorization": f"Bearer client-{number}"}
        async with self._api.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code == 429:
                tally.refusal_s.append(time.monotonic() - started)
                return float(response.headers["retry-after"])
            response.raise_for_status()
            last, is_first = started, True
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    now = time.monotonic()
                    (tally.first_s if is_first else tally.gaps_s).append(now - last)
                    last, is_first = now, False
        tally.completed += 1
        return 0.0


async def phase(url: str, num_clients: int, seconds: float, max_tokens: int) -> dict[str, Any]:
    before = resident_bytes()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as api:
        crowd = Crowd(api, seconds, max_tokens)
        await crowd.run(num_clients)
    tally = crowd.tally
    return {
        "clients": num_clients,
        "completed": tally.completed,
        "refused": len(tally.refusal_s),
        "inter_token_s": figures(tally.gaps_s),
        "first_token_s": figures(tally.first_s),
        "refusal_s": figures(tally.refusal_s),
        "resident_bytes": {"before": before, "after": resident_bytes()},
    }


def figures(values: list[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in percentiles(values).items()}


def resident_bytes() -> dict[str, int]:
    """Of the replicas on this machine, by the name that Ray gives their processes."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode() if entry.name.isdigit() else ""
            if command.startswith("ray::ServeReplica:"):
                found[f"{command.split()[0]} {entry.name}"] = int((entry / "statm").read_text().split()[1]) * 4096
        except OSError:  # gone meanwhile
            continue
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    await phase(options.url, 1, 2.0, options.max_tokens)  # warm
    half = await phase(options.url, max(options.seats // 2, 1), options.seconds, options.max_tokens)
    over = await phase(options.url, 10 * options.seats, options.seconds, options.max_tokens)
    return {"seats": options.seats, "half_load": half, "ten_times": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seats", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(measure(options))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
