"""What being watched costs: one cluster that tells nothing against one with traces, scrapes and TLS, turn about."""

from __future__ import annotations

import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem_serve.bench.cluster import measure_turn_about
from tandem_serve.bench.plain_pools import plain_pools
from tandem_serve.bench.prompts import held_out_prompts
from tandem_serve.bench.run_decode import provenance
from tandem_serve.models.folder import load_tokenizer
from tandem_serve.rpc.span_counter import SpanCounter

BARE, OBSERVED = "bare", "observed"


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
    """Both clusters run at once, only one of them works at any time. tokens/s as in bench decode.

    Args:
        expect: told how many completions there will be; what it returns is called after each.
    """
    primary = options.pair / "primary"
    prompts = held_out_prompts(load_tokenizer(primary), primary, options.limit, num_tokens=128)
    with tempfile.TemporaryDirectory() as name, closing(SpanCounter()) as collector:
        folder = Path(name)
        for mode in (BARE, OBSERVED):
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
            _scraping(observed.metrics, options.scrape_interval_s) as num_scrapes,
        ):
            figures = measure_turn_about(
                {BARE: (bare.http, None), OBSERVED: (observed.http, None)},
                prompts,
                options.max_tokens,
                expect(2 * len(prompts)),
                reference=BARE,
            )
            scrapes = num_scrapes()
        exports = collector.num_exports
    return {
        **figures,
        "num_scrapes": scrapes,
        "num_exports": exports,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "provenance": provenance(),
    }


@contextmanager
def _scraping(urls: Sequence[str], interval_s: float) -> Iterator[Callable[[], int]]:
    """Reads every URL once an interval, as Prometheus would. Yields how to ask for the number of rounds so far."""
    stopped, rounds = threading.Event(), [0]

    def scrape() -> None:
        while not stopped.wait(interval_s):
            for url in urls:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    answer.read()
            rounds[0] += 1

    thread = threading.Thread(target=scrape, name="scraping", daemon=True)
    thread.start()
    try:
        yield lambda: rounds[0]
    finally:
        stopped.set()
        thread.join()
