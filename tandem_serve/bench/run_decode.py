"""Puts `bench decode` together: pair, engines (the drafter here or in another process), prompts, provenance."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tandem_serve import __version__
from tandem_serve.bench.decode import DecodePlan, Mode, TimedDecoder, measure_decode
from tandem_serve.bench.drafter_process import drafter_process, pin_to_core
from tandem_serve.bench.prompts import load_prompts
from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import (
    DTYPES,
    drafter_info,
    load_decoder,
    load_drafter,
    load_tokenizer,
    primary_info,
)
from tandem_serve.models.inflate import inflate
from tandem_serve.rpc.drafting_client import GrpcLinkFactory

DRAFTER_FOLDERS = {"tandem": "drafter", "plain-drafter": "plain-drafter"}
MODES = ("plain", *DRAFTER_FOLDERS, *(f"{name}@grpc" for name in DRAFTER_FOLDERS))


@dataclass(frozen=True)
class DecodeOptions:
    """The command's options, checked by the command line."""

    pair: Path
    prompts: str
    field: str
    limit: int
    modes: tuple[str, ...]
    block_length: int
    max_tokens: int
    temperature: float
    transport: str  # local | grpc
    inflate: int
    primary_dtype: str
    drafter_dtype: str
    num_threads: int


def run_decode(options: DecodeOptions, announce: Callable[[int], Callable[[], None]]) -> dict[str, Any]:
    """Measures; returns the JSON document. `announce` hears the number of runs, returns what to call after each."""
    torch.set_num_threads(options.num_threads)
    primary = options.pair / "primary"
    decoder = load_decoder(primary, dtype=DTYPES[options.primary_dtype])
    info = primary_info(primary)
    num_parameters = sum(p.numel() for p in decoder.parameters())
    if options.inflate > 1:
        decoder = inflate(decoder, options.inflate)
    num_inflated = sum(p.numel() for p in decoder.parameters())
    decoder.pack()
    longest = info.max_model_len - options.max_tokens
    prompts = load_prompts(options.prompts, options.field, options.limit, load_tokenizer(primary), primary, longest)
    config = PrimaryEngineConfig(
        dtype=options.primary_dtype,
        max_num_seqs=1,
        block_length=options.block_length,
        draft_timeout_s=30.0,  # never: a benchmark waits
    )
    timed = TimedDecoder(decoder)
    plan = DecodePlan(prompts, options.max_tokens, options.temperature)
    with contextlib.ExitStack() as stack:
        modes = [stack.enter_context(_mode(name, options, decoder, info, config)) for name in options.modes]
        done = announce(len(modes) * (len(prompts)))
        measured = measure_decode(modes, plan, timed, done)
    return {
        **measured,
        "inflated": options.inflate > 1,
        "num_prompts": len(prompts),
        "options": {**options.__dict__, "pair": str(options.pair.name), "modes": list(options.modes)},
        "primary_parameters": num_parameters,
        "primary_parameters_inflated": num_inflated,
        "provenance": provenance(),
    }


def provenance() -> dict[str, Any]:
    """What a figure depends on besides its command line."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "command": " ".join(["tandem-serve", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or None,
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


@contextlib.contextmanager
def _mode(name: str, options: DecodeOptions, decoder: Any, info: Any, config: PrimaryEngineConfig) -> Iterator[Mode]:
    """One mode's engine, with its drafter for as long as it is measured."""
    if name == "plain":
        mode = Mode(name, decoder, info, config, None)
        yield mode
        mode.close()
        return
    drafter, _, transport = name.partition("@")
    folder = options.pair / DRAFTER_FOLDERS[drafter]
    if not folder.is_dir():
        raise ConfigError(f"mode {name}: the pair has no folder {folder.name}")
    with _drafter(folder, options, transport or options.transport) as (factory, address):
        mode = Mode(name, decoder, info, config, factory, address)
        yield mode
        mode.close()


@contextlib.contextmanager
def _drafter(folder: Path, options: DecodeOptions, transport: str) -> Iterator[tuple[Any, str]]:
    """A way to reach a drafter of that checkpoint, and its address."""
    if transport == "grpc":
        pin_to_core(0)
        with drafter_process(folder, options.drafter_dtype, core=1) as address:
            yield GrpcLinkFactory(), address
        return
    model = load_drafter(folder, dtype=DTYPES[options.drafter_dtype]).pack()
    config = DrafterEngineConfig()
    info = drafter_info(folder, max_block_length=config.max_block_length)
    engine = DrafterEngine(model, info, config)
    yield local_link_factory({folder.name: engine}, synchronous=True), folder.name
