"""`bench engines`: every way to decode one model on the same prompts, a process each, wave by wave in turn."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tandem_serve.bench.drafter_process import drafter_process
from tandem_serve.bench.prompts import load_prompts
from tandem_serve.bench.run_decode import provenance
from tandem_serve.errors import ConfigError, Unavailable
from tandem_serve.models.checkpoint import drafter_info, load_decoder, load_tokenizer, primary_info, write_model
from tandem_serve.models.inflate import inflate
from tandem_serve.serving.chaos.network import FAIR, BadLink, Weather

BASELINES = ("vllm", "vllm-undrafted", "torch")  # one core, the primary's: what a primary does without a drafter pool
REMOTE = (
    "vllm-tandem",
    "vllm-tandem-synchronous",
    "vllm-tandem-rejection",
    "vllm-tandem-colocated",  # the primary has both cores, as the peers do, and the drafter shares the second
    "torch-tandem",
)  # and a core for the drafter
FAULTY = {  # vllm-tandem with a bad network before its drafter: what a primary must not suffer from
    "vllm-tandem-slow": (Weather(delay_s=0.2),),  # bytes come 200 ms later, each way
    "vllm-tandem-flapping": (Weather(is_cut=True), FAIR),  # gone for a second, back for a second
    "vllm-tandem-lost": (Weather(is_cut=True),),  # gone for good
}
PEERS = ("vllm-ngram", "vllm-draft-model", "transformers-assisted")  # both cores: they draft where they verify
MODES = (*BASELINES, *REMOTE, *FAULTY, *PEERS)
COMPARED = (
    ("vllm-tandem", "vllm"),
    ("vllm-tandem", "vllm-undrafted"),
    ("vllm-undrafted", "vllm"),
    ("vllm-tandem", "vllm-tandem-synchronous"),
    ("vllm-tandem", "vllm-tandem-rejection"),
    ("vllm-tandem-colocated", "vllm"),
    ("vllm-tandem-colocated", "vllm-tandem"),
    ("vllm-tandem-colocated", "vllm-ngram"),
    ("vllm-tandem-colocated", "vllm-draft-model"),
    *((mode, "vllm") for mode in FAULTY),
    ("vllm-tandem", "vllm-ngram"),
    ("vllm-tandem", "vllm-draft-model"),
    ("vllm-tandem", "transformers-assisted"),
    ("vllm-tandem", "torch-tandem"),
    ("vllm-ngram", "vllm"),
    ("vllm-draft-model", "vllm"),
    ("torch-tandem", "torch"),
)


@dataclass(frozen=True)
class EngineOptions:
    """The command's options, checked by the command line."""

    pair: Path
    prompts: str
    field: str
    limit: int  # prompts at each concurrency
    modes: tuple[str, ...]
    concurrency: tuple[int, ...]
    block_length: int
    max_tokens: int
    temperature: float
    inflate: int
    dtype: str
    draft_timeout_s: float


class Child:
    """A contender's process (engine_child.py)."""

    def __init__(self, mode: str, options: dict[str, Any], num_threads: int) -> None:
        self.mode = mode
        self.break_link: Callable[[], None] = lambda: None  # called once it is ready
        command = [sys.executable, "-m", "tandem_serve.bench.engine_child", mode, json.dumps(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "VLLM_LOGGING_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_until_ready(self) -> None:
        """They load side by side."""
        self._read()

    def run(self, wave: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wave) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"mode {self.mode} has died (exit status {self._process.wait()}); see above")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run_engines(options: EngineOptions, announce: Callable[[int], Callable[[], None]]) -> dict[str, Any]:
    """Measures; returns the JSON document. `announce` hears the number of waves, returns what to call after each.

    Raises:
        ConfigError, CheckpointError: options or models that cannot be used.
        Unavailable: a contender does not start, or dies.
    """
    primary = options.pair / "primary"
    info = primary_info(primary)
    prompts = load_prompts(
        options.prompts, options.field, options.limit, load_tokenizer(primary), primary, info.max_model_len // 2
    )
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_inflated(primary, options.inflate, options.dtype))
        children = [stack.enter_context(_child(mode, options, model)) for mode in options.modes]
        for child in children:
            child.wait_until_ready()
            child.break_link()
        num_waves = sum(-(-len(prompts) // c) + 1 for c in options.concurrency)
        done = announce(num_waves * len(children))
        waves = {str(c): _measure(children, options, prompts, c, done) for c in options.concurrency}
    return {
        "modes": {
            c: {mode: _summary(found, by_mode) for mode, found in by_mode.items()} for c, by_mode in waves.items()
        },
        "ratios": _ratios(waves),
        "num_prompts": len(prompts),
        "options": {**asdict(options), "pair": options.pair.name},
        "provenance": provenance(),
    }


@contextlib.contextmanager
def _inflated(primary: Path, times: int, dtype: str) -> Iterator[Path]:
    """The primary's folder, or a temporary one of the same function that costs so many times as much."""
    if times == 1:
        yield primary
        return
    from tandem_serve.models.checkpoint import DTYPES

    with TemporaryDirectory(prefix="tandem-inflated-") as folder:
        decoder = inflate(load_decoder(primary, dtype=DTYPES[dtype]), times)
        write_model(decoder, Path(folder), tokenizer_from=primary)
        yield Path(folder)


@contextlib.contextmanager
def _child(mode: str, options: EngineOptions, model: Path) -> Iterator[Child]:
    """A contender, with a drafter of its own where it needs one."""
    drafter, plain = options.pair / "drafter", options.pair / "plain-drafter"
    num_cores = os.cpu_count() or 1
    has_both = mode in PEERS or mode == "vllm-tandem-colocated"
    settings: dict[str, Any] = {
        "model": str(model),
        "plain_drafter": str(plain),
        "info": asdict(primary_info(options.pair / "primary")),
        "dtype": options.dtype,
        "taps": drafter_info(drafter, max_block_length=16).taps,
        "block_length": options.block_length,
        "draft_timeout_s": options.draft_timeout_s,
        "cores": list(range(min(2, num_cores))) if has_both else [0],
    }
    if mode == "vllm-draft-model" and not plain.is_dir():
        raise ConfigError(f"mode {mode}: the pair has no folder {plain.name}")
    with contextlib.ExitStack() as stack:
        if mode in REMOTE or mode in FAULTY:
            settings["drafter"] = stack.enter_context(drafter_process(drafter, "float32", core=min(1, num_cores - 1)))
        link = BadLink(settings["drafter"]) if mode in FAULTY else None
        if link is not None:
            settings["drafter"] = link.address
        child = Child(mode, settings, 2 if has_both else 1)
        if link is not None:
            child.break_link = lambda: stack.enter_context(_bad_weather(link, FAULTY[mode]))
        try:
            yield child
        finally:
            child.close()


@contextlib.contextmanager
def _bad_weather(link: BadLink, weathers: Sequence[Weather]) -> Iterator[None]:
    """One after the other, a second each and over again, until the context ends."""
    ended = threading.Event()

    def change() -> None:
        for weather in itertools.cycle(weathers):
            link.set_weather(weather)
            if ended.wait(1.0):
                return

    threading.Thread(target=change, name="weather", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _measure(
    children: Sequence[Child],
    options: EngineOptions,
    prompts: Sequence[tuple[int, ...]],
    concurrency: int,
    done: Callable[[], None],
) -> dict[str, list[dict[str, Any]]]:
    """Waves of `concurrency` prompts through every child in turn; the first wave once more before it counts."""
    starts = list(range(0, len(prompts), concurrency))
    found: dict[str, list[dict[str, Any]]] = {child.mode: [] for child in children}
    for turn, start in enumerate([starts[0], *starts]):
        seeds = list(range(start, min(start + concurrency, len(prompts))))
        wave = {
            "prompts": [prompts[seed] for seed in seeds],
            "seeds": seeds,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
        }
        for place in range(len(children)):
            child = children[(turn + place) % len(children)]
            result = child.run(wave)
            if turn:
                found[child.mode].append(result)
            done()
    return found


def _decoding(waves: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(tokens, seconds) from the moment that every prompt of a wave has its first token to the wave's end."""
    num_tokens, seconds = 0.0, 0.0
    for wave in waves:
        begun = max(times[0] for times in wave["step_times"])
        ended = max(times[-1] for times in wave["step_times"])
        for times, counts in zip(wave["step_times"], wave["step_tokens"], strict=True):
            num_tokens += sum(count for time, count in zip(times, counts, strict=True) if time > begun)
        seconds += ended - begun
    return num_tokens, seconds


def tokens_per_s(waves: Sequence[Mapping[str, Any]]) -> float:
    num_tokens, seconds = _decoding(waves)
    return num_tokens / seconds if seconds else 0.0


def _summary(waves: Sequence[Mapping[str, Any]], by_mode: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    times_of_texts = [times for wave in waves for times in wave["step_times"]]
    gaps = sorted(later - earlier for times in times_of_texts for earlier, later in itertools.pairwise(times))
    num_drafts = sum(wave["num_drafts"] for wave in waves)
    total_s = sum(wave["total_s"] for wave in waves)
    plain = by_mode.get("vllm-undrafted") or by_mode.get("vllm") or by_mode.get("torch")
    texts = [text for wave in waves for text in wave["token_ids"]]
    return {
        "tokens_per_s": tokens_per_s(waves),
        "tokens_per_s_with_prompts": sum(map(len, texts)) / total_s if total_s else 0.0,
        "time_to_first_token_ms": 1e3 * median(times[0] for times in times_of_texts),
        "step_gap_ms_p50": 1e3 * gaps[len(gaps) // 2] if gaps else 0.0,
        "step_gap_ms_p99": 1e3 * gaps[int(0.99 * (len(gaps) - 1))] if gaps else 0.0,
        "tokens_per_step": sum(map(len, texts)) / max(sum(map(len, times_of_texts)), 1),
        "drafts_per_block": sum(wave["num_draft_tokens"] for wave in waves) / num_drafts if num_drafts else 0.0,
        "accepted_per_block": sum(wave["num_accepted_tokens"] for wave in waves) / num_drafts if num_drafts else 0.0,
        "idle_share": sum(wave["idle_s"] for wave in waves) / total_s if total_s else 0.0,
        "rounds_without_draft": _sums(wave["stalls"] for wave in waves),
        "identical_to_plain": None
        if plain is None
        else sum(a == b for a, b in zip(texts, (t for w in plain for t in w["token_ids"]), strict=True)),
    }


def _sums(counts: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in counts:
        for name, value in each.items():
            found[name] = found.get(name, 0.0) + value
    return found


def _ratios(waves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, dict[str, float]]:
    """tokens/s of one mode over another's, by concurrency."""
    found: dict[str, dict[str, float]] = {}
    for concurrency, by_mode in waves.items():
        for over, under in COMPARED:
            if over in by_mode and under in by_mode and (rate := tokens_per_s(by_mode[under])):
                found.setdefault(f"{over}/{under}", {})[concurrency] = tokens_per_s(by_mode[over]) / rate
    return found
