"""1 stream, then 40, then 1 again at a running cluster whose pools scale: their sizes over time, as a plot.

    tandem-serve up deployments/autoscale.yaml
    python benchmarks/load_step.py --json runs/load-step.json --plot runs/load-step.png --trace runs/load-step.jsonl

Two loads that only one pool grows for:

    python benchmarks/load_step.py --streams 16 --speculation '{"block_length": 0}'
    python benchmarks/load_step.py --streams 3 --speculation '{"block_length": 32, "policy": "entropy", "threshold": 0}'

The trace is what was asked when: `tandem-serve simulate deployments/autoscale.yaml --trace ...` plays it on paper.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from tandem_serve.serving.planning import percentiles, plot


class LoadStep:
    """Streams at a cluster and looks at its pools."""

    def __init__(self, url: str, max_tokens: int, speculation: dict[str, Any]) -> None:
        self._url, self._max_tokens, self._speculation = url, max_tokens, speculation
        self._started = time.monotonic()
        self.arrivals: list[dict[str, float]] = []
        self.series: list[dict[str, float]] = []
        self.completed = 0
        self.first_token_s: list[float] = []
        self.token_s: list[float] = []  # from asking to the last token, by token
        self.refused = 0
        self.phases: list[dict[str, float]] = []  # how each ended

    async def run(self, phases: list[tuple[int, float]]) -> None:
        """Phases of so many streams for so many seconds."""
        watching = asyncio.create_task(self._watch())
        for num_streams, seconds in phases:
            until = time.monotonic() + seconds
            await asyncio.gather(*(self._stream(number, until) for number in range(num_streams)))
            self.phases.append({"streams": num_streams, **self.series[-1]})
        watching.cancel()

    async def _stream(self, number: int, until: float) -> None:
        async with openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key=f"client-{number}", max_retries=0) as api:
            while time.monotonic() < until:
                arrival = {"at_s": time.monotonic() - self._started, "output_tokens": self._max_tokens}
                try:
                    stream = await api.completions.create(
                        model="",
                        prompt=f"# {number}\ndef function(",
                        max_tokens=self._max_tokens,
                        stream=True,
                        stream_options={"include_usage": True},
                        extra_body={"ignore_eos": True, "speculation": self._speculation},
                    )
                    usage, first_s = None, 0.0
                    async for chunk in stream:
                        first_s = first_s or time.monotonic() - self._started
                        usage = chunk.usage or usage
                except openai.RateLimitError as error:
                    self.refused += 1
                    await asyncio.sleep(float(error.response.headers["retry-after"]))
                    continue
                self.completed += 1
                self.first_token_s.append(first_s - arrival["at_s"])
                ended_s = time.monotonic() - self._started
                self.token_s.append((ended_s - arrival["at_s"]) / self._max_tokens)
                self.arrivals.append({**arrival, "prompt_tokens": usage.prompt_tokens if usage else 0})

    async def _watch(self) -> None:
        async with httpx.AsyncClient(timeout=10) as client:
            while True:
                try:
                    status: dict[str, Any] = (await client.get(f"{self._url}/status")).json()
                except (httpx.HTTPError, ValueError):  # too busy just now, or not the router that answers
                    await asyncio.sleep(0.5)
                    continue
                primaries = [each["status"] for each in status["primaries"] if each["status"]]
                self.series.append(
                    {
                        "at_s": time.monotonic() - self._started,
                        "running": sum(each["num_requests_running"] for each in primaries),
                        "waiting": sum(each["num_requests_waiting"] for each in primaries),
                        "primaries": len(primaries),
                        "drafters": sum(bool(each["linked_primaries"]) for each in status["drafters"]),
                    }
                )
                await asyncio.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the three phases")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--speculation", type=json.loads, default={}, help="as in a request's body")
    for name in ("json", "plot", "trace"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args()
    step = LoadStep(options.url, options.max_tokens, options.speculation)
    asyncio.run(step.run([(streams, options.seconds) for streams in (1, options.streams, 1)]))
    report = {
        "completed": step.completed,
        "refused": step.refused,
        "first_token_s": percentiles(step.first_token_s),
        "seconds_per_token": percentiles(step.token_s),
        "phases": step.phases,
        "series": step.series,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(report) + "\n")
    if options.trace is not None:
        options.trace.write_text("".join(json.dumps(arrival) + "\n" for arrival in step.arrivals))
    if options.plot is not None:
        plot(report, options.plot)
    for plural in ("primaries", "drafters"):
        ends = ", ".join(f"{phase[plural]:.0f} with {phase['streams']:.0f}" for phase in step.phases)
        print(f"{plural}: {step.series[0][plural]:.0f} at the start; {ends}")
    for name in ("first_token_s", "seconds_per_token"):
        print(f"{name}: {json.dumps(report[name])}")
    print(f"completed {step.completed}, refused {step.refused}")


if __name__ == "__main__":
    main()
