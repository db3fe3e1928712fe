"""What being watched costs: a cluster that tells nothing against one with traces, scrapes and TLS, turn about.

A third tells nothing either. How far it is from the first says how well this machine can tell two clusters apart.
"""

from __future__ import annotations

import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem_serve.bench.cluster import measure_turn_about
from tandem_serve.bench.plain_pools import plain_pools
from tandem_serve.bench.prompts import held_out_prompts
from tandem_serve.bench.run_decode import provenance
from tandem_serve.bench.summary import median_interval, quantile
from tandem_serve.errors import Unavailable
from tandem_serve.models.folder import load_tokenizer
from tandem_serve.rpc.span_counter import SpanCounter

BARE, CONTROL, OBSERVED = "bare", "control", "observed"
_TICK_S = 0.02


@dataclass(frozen=True, slots=True)
class OverheadOptions:
    """What to measure."""

    pair: Path
    limit: int = 40  # prompts
    max_tokens: int = 96
    sample_ratio: float = 0.01
    scrape_interval_s: float = 1.0
    certificates: Path | None = None  # a folder for each role; None: pools talk in plain text


def run_overhead(options: OverheadOptions, expect: Callable[[int], Callable[[], None]]) -> dict[str, Any]:
    """All clusters run at once, only one of them works at any time, and is scraped if so. tokens/s as in bench decode.

    Args:
        expect: told how many completions there will be; what it returns is called after each.
    """
    primary = options.pair / "primary"
    prompts = held_out_prompts(load_tokenizer(primary), primary, options.limit, num_tokens=128)
    with tempfile.TemporaryDirectory() as name, closing(SpanCounter()) as collector:
        folder = Path(name)
        for mode in (BARE, CONTROL, OBSERVED):
            (folder / mode).mkdir()
        file = folder / "observability.yaml"
        traces = f"{{endpoint: '{collector.endpoint}', sample_ratio: {options.sample_ratio}}}"
        file.write_text(f"observability: {{traces: {traces}}}\n", encoding="utf-8")

        def watched(role: str) -> list[str]:
            tls = [] if options.certificates is None else ["--tls-folder", str(options.certificates / role)]
            return ["--observability", str(file), *tls]

        with (
            plain_pools(options.pair, folder / BARE, lambda role: (), with_metrics=False) as bare,
            plain_pools(options.pair, folder / OBSERVED, watched, with_metrics=True) as observed,
            plain_pools(options.pair, folder / CONTROL, lambda role: (), with_metrics=False) as control,
            closing(_Scraper(observed.metrics, options.scrape_interval_s)) as scraper,
        ):
            figures = measure_turn_about(
                {BARE: (bare.http, None), OBSERVED: (observed.http, None), CONTROL: (control.http, None)},
                prompts,
                options.max_tokens,
                expect(3 * len(prompts)),
                reference=BARE,
                during=lambda mode: scraper.working() if mode == OBSERVED else nullcontext(),
            )
        exports = collector.num_exports
    return {
        **figures,
        "cost": cost_of_watching(figures["tokens_per_s_by_prompt"]),
        "num_scrapes": scraper.num_rounds,
        "num_exports": exports,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "provenance": provenance(),
    }


def cost_of_watching(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The share of tokens/s that the watched cluster lacks against the mean of the others: median prompt, and 95 %."""
    prompts = zip(rates[OBSERVED], rates[BARE], rates[CONTROL], strict=True)
    costs = sorted(1 - 2 * observed / (bare + control) for observed, bare, control in prompts if bare + control)
    low, high = median_interval(costs)
    return {"median": quantile(costs, 0.5), "low": low, "high": high}


class _Scraper:
    """Reads every URL as Prometheus would, once in every interval_s that the cluster works: never while others do.

    `close` raises what has ended it early: a cluster that is not read costs too little.
    """

    def __init__(self, urls: Sequence[str], interval_s: float) -> None:
        self.num_rounds = 0
        self._urls, self._interval_s = urls, interval_s
        self._stopped, self._is_working = threading.Event(), False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="scraping", daemon=True)
        self._thread.start()

    @contextmanager
    def working(self) -> Iterator[None]:
        self._is_working = True
        try:
            yield
        finally:
            self._is_working = False

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        if self._error is not None:
            raise Unavailable(f"the watched cluster's metrics cannot be read: {self._error}") from self._error

    def _run(self) -> None:
        worked_s = 0.0
        while not self._stopped.wait(_TICK_S):
            worked_s += _TICK_S * self._is_working
            if self._is_working and worked_s >= self._interval_s:
                worked_s = 0.0
                try:
                    self._scrape()
                except Exception as error:
                    self._error = error
                    return

    def _scrape(self) -> None:
        for url in self._urls:
            with urllib.request.urlopen(url, timeout=5) as answer:
                answer.read()
        self.num_rounds += 1
