"""Block policies against each other: the same requests under each, group by group in turn, in one process.

With policies of the plain drafter among them (plain-drafter:fixed-5) that is SPEED as well, plain against tandem, each
at its best block length, for several requests at once and for n > 1 too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tandem_serve.bench.prompts import load_prompts
from tandem_serve.bench.run_decode import provenance
from tandem_serve.bench.summary import quantile
from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.errors import ConfigError, TandemError
from tandem_serve.models.checkpoint import (
    drafter_acceptance,
    drafter_info,
    load_decoder,
    load_drafter,
    load_tokenizer,
    primary_info,
)
from tandem_serve.models.inflate import inflate
from tandem_serve.types import GenerationRequest, GenerationStep, PolicyName, SamplingParams

FIXED, PLAIN = "fixed-", "plain-drafter:"


@dataclass(frozen=True)
class PoliciesOptions:
    """The command's options, checked by the command line."""

    pair: Path
    prompts: str
    field: str
    limit: int
    policies: tuple[str, ...]  # fixed-N, entropy, router, optimal; behind plain-drafter: those of the plain drafter
    batches: tuple[int, ...]  # requests at once
    samples: tuple[int, ...]  # completions a request
    temperatures: tuple[float, ...]
    max_tokens: int
    inflate: int
    num_threads: int


@dataclass(frozen=True)
class Cell:
    """One load: `batch` requests at once, of which each is completed n times."""

    batch: int
    n: int
    temperature: float


@dataclass(frozen=True)
class GroupRun:
    """One group of requests, decoded at once. Prompts and first tokens are left out."""

    texts: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_rounds: int  # of single sequences, with drafts or without
    num_drafts: int
    num_accepted: int
    seconds: float


class PolicyUnderTest:
    """One policy with engines of its own, on shared weights: what it learns of costs is its own, too."""

    def __init__(self, name: str, primary: Any, info: Any, drafter: DrafterEngine, num_sequences: int) -> None:
        self.name = name
        kind, _, length = name.removeprefix(PLAIN).partition("-")
        self._policy, self._block_length = PolicyName(kind), int(length) if length else None
        config = PrimaryEngineConfig(max_num_seqs=num_sequences, kv_cache_tokens=1 << 20, draft_timeout_s=60.0)
        self._engine = TorchPrimary(
            primary, info, config, link_factory=local_link_factory({"d": drafter}, synchronous=True)
        )
        self._engine.set_drafters(["d"])

    def run(self, requests: Sequence[GenerationRequest]) -> GroupRun:
        """Decodes the requests at once. The clock starts when each has its first token."""
        steps: dict[str, list[GenerationStep]] = {request.request_id: [] for request in requests}

        def sink(item: GenerationStep | TandemError) -> None:
            if isinstance(item, TandemError):
                raise item
            steps[item.request_id].append(item)

        for request in requests:
            self._engine.submit(replace(request, policy=self._policy, block_length=self._block_length), sink)
        while not all(steps.values()):
            self._engine.step()
        skipped = {name: len(of_one) for name, of_one in steps.items()}
        started = time.perf_counter()
        self._engine.run_until_idle()
        seconds = time.perf_counter() - started
        counted = [step for name, of_one in steps.items() for step in of_one[skipped[name] :]]
        return GroupRun(
            texts=tuple(tuple(t for step in of_one for t in step.token_ids) for of_one in steps.values()),
            num_tokens=sum(len(step.token_ids) for step in counted),
            num_rounds=len(counted),
            num_drafts=sum(step.num_draft_tokens for step in counted),
            num_accepted=sum(step.num_accepted_tokens for step in counted),
            seconds=seconds,
        )

    def close(self) -> None:
        self._engine.close()


def run_policies(options: PoliciesOptions, announce: Callable[[int], Callable[[], None]]) -> dict[str, Any]:
    """Measures; returns the JSON document. `announce` hears the number of runs, returns what to call after each."""
    torch.set_num_threads(options.num_threads)
    primary_folder = options.pair / "primary"
    primary, info = load_decoder(primary_folder), primary_info(primary_folder)
    if options.inflate > 1:
        primary = inflate(primary, options.inflate)
    primary.pack()
    longest = info.max_model_len - options.max_tokens
    prompts = load_prompts(
        options.prompts, options.field, options.limit, load_tokenizer(primary_folder), primary_folder, longest
    )
    cells = [
        Cell(batch, n, temperature)
        for temperature, batch, n in itertools.product(options.temperatures, options.batches, options.samples)
        if n == 1 or temperature > 0  # greedily, all n would be the same
    ]
    if not cells:
        raise ConfigError("nothing to measure: several samples need a temperature above 0")
    num_sequences = max(cell.batch * cell.n for cell in cells)
    drafters = _Drafters(options.pair)
    contenders = [
        PolicyUnderTest(name, primary, info, drafters.engine(name), num_sequences) for name in options.policies
    ]
    done = announce(sum(max(1, len(prompts) // cell.batch) for cell in cells) * len(contenders))
    measured = [measure_cell(cell, contenders, prompts, options.max_tokens, done) for cell in cells]
    for contender in contenders:
        contender.close()
    return {
        "cells": measured,
        "has_acceptance_model": drafters.has_acceptance_model,
        "num_prompts": len(prompts),
        "options": {**vars(options), "pair": options.pair.name},
        "provenance": provenance(),
    }


class _Drafters:
    """A pair's drafters, loaded once each; every policy gets an engine of its own."""

    def __init__(self, pair: Path) -> None:
        self._pair = pair
        self._loaded: dict[str, tuple[Any, Any]] = {}  # model and acceptance model by folder
        self.has_acceptance_model = False

    def engine(self, policy: str) -> DrafterEngine:
        """The engine of a policy.

        Raises:
            ConfigError: the pair has no plain drafter.
        """
        name = "plain-drafter" if policy.startswith(PLAIN) else "drafter"
        folder = self._pair / name
        if not folder.is_dir():
            raise ConfigError(f"policy {policy}: the pair has no folder {name}")
        if name not in self._loaded:
            self._loaded[name] = load_drafter(folder).pack(), drafter_acceptance(folder)
        model, acceptance = self._loaded[name]
        self.has_acceptance_model |= acceptance is not None and name == "drafter"
        config = DrafterEngineConfig()
        info = drafter_info(folder, max_block_length=config.max_block_length)
        return DrafterEngine(model, info, config, acceptance=acceptance)


def measure_cell(
    cell: Cell,
    contenders: Sequence[PolicyUnderTest],
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    """Runs every group of prompts under every policy, the order turning by one each time. The first warms up."""
    groups = [prompts[i : i + cell.batch] for i in range(0, len(prompts) - cell.batch + 1, cell.batch)] or [prompts]
    runs: dict[str, list[GroupRun]] = {contender.name: [] for contender in contenders}
    for turn in range(-1, len(groups)):
        requests = _requests(cell, groups[max(turn, 0)], max(turn, 0), max_tokens)
        for place in range(len(contenders)):
            contender = contenders[(turn + place) % len(contenders)]
            run = contender.run(requests)
            if turn >= 0:
                runs[contender.name].append(run)
                done()
    return {**vars(cell), "num_groups": len(groups), **_compare(runs)}


def _requests(cell: Cell, prompts: Sequence[tuple[int, ...]], turn: int, max_tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"p{number}-{sample}",
            prompt,
            SamplingParams(temperature=cell.temperature, seed=1000 * turn + 16 * number + sample),
            max_tokens,
        )
        for number, prompt in enumerate(prompts)
        for sample in range(cell.n)
    ]


def _compare(runs: dict[str, list[GroupRun]]) -> dict[str, Any]:
    """Each policy's figures, and its tokens/s over the best fixed length's: the best in hindsight, on the same runs."""
    rates = {name: sum(r.num_tokens for r in of_one) / sum(r.seconds for r in of_one) for name, of_one in runs.items()}
    best = _fastest(rates, FIXED) or max(rates, key=lambda name: rates[name])
    reference = next(iter(runs.values()))
    policies = {}
    for name, of_one in runs.items():
        rounds = sum(run.num_rounds for run in of_one)
        by_group = sorted(
            (ours.num_tokens / ours.seconds) / (theirs.num_tokens / theirs.seconds)
            for ours, theirs in zip(of_one, runs[best], strict=True)
        )
        policies[name] = {
            "tokens_per_s": rates[name],
            "over_best_fixed": rates[name] / rates[best],
            "over_best_fixed_by_group": {f"p{round(100 * q)}": quantile(by_group, q) for q in (0.1, 0.5, 0.9)},
            "drafts_a_round": sum(run.num_drafts for run in of_one) / rounds,
            "accepted_a_round": sum(run.num_accepted for run in of_one) / rounds,
            "identical_groups": sum(a.texts == b.texts for a, b in zip(of_one, reference, strict=True)),
        }
    plain = _fastest(rates, PLAIN + FIXED)
    against = (
        {}
        if plain is None or not best.startswith(FIXED)
        else {"best_fixed_plain": plain, "tandem/plain-drafter": rates[best] / rates[plain]}
    )
    return {"best_fixed": best, **against, "policies": policies}


def _fastest(rates: dict[str, float], prefix: str) -> str | None:
    return max((name for name in rates if name.startswith(prefix)), key=lambda name: rates[name], default=None)
