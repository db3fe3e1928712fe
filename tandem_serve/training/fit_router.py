"""Trains the acceptance models of a drafter (the paper's router MLP), and measures what they are worth."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tandem_serve.decoding.stopping_rules import ENTROPY_SCALE
from tandem_serve.engine.draft_loop import DraftJob, draft_blocks
from tandem_serve.engine.draft_scores import AcceptanceScorer
from tandem_serve.engine.forward import Rows, forward
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.errors import ConfigError
from tandem_serve.models.acceptance import AcceptanceConfig, AcceptanceModel, save_acceptance
from tandem_serve.models.checkpoint import (
    drafter_info,
    fingerprint,
    load_decoder,
    load_drafter,
    load_tokenizer,
    primary_info,
)
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.calibration import (
    RoundCosts,
    best_fixed,
    best_threshold,
    block_lengths,
    calibration,
    fixed_lengths,
    replay,
)
from tandem_serve.training.corpus import Document
from tandem_serve.training.held_out import heldout_prompts
from tandem_serve.training.router_examples import RouterExamples, collect_examples, write_texts
from tandem_serve.training.run_folder import provenance
from tandem_serve.types import PolicyName, SamplingParams, StoppingRule, mismatches

_ADAPTIVE = (PolicyName.ENTROPY, PolicyName.ROUTER, PolicyName.OPTIMAL)
Target = Literal["accept", "tv"]
REPORT_FILE = "router-report.json"
CHOOSES_EVERY = 3  # every third text chooses thresholds, the rest train; odd: texts are greedy and sampled in turn


@dataclass(frozen=True)
class RouterConfig:
    """How to collect and to train. Target `tv`: the paper's 1 - TV(MS, ML); `accept`: whether the draft was right."""

    target: Target = "accept"
    num_texts: int = 64  # to train and to choose thresholds on; half as many held-out ones to measure on
    prompt_tokens: int = 64
    num_tokens: int = 128  # that the primary writes behind each prompt
    temperature: float = 0.8  # of every other text; the rest is greedy
    block_length: int = 12  # drafts a block
    top_k: int = 4
    hidden_size: int = 64
    num_steps: int = 600
    batch_size: int = 1024
    learning_rate: float = 3e-3
    seed: int = 0


def fit_router(
    primary_folder: Path,
    drafter_folder: Path,
    training: Sequence[Document],
    held_out: Sequence[Document],
    config: RouterConfig,
    out: Path | None = None,
) -> Path:
    """Runs the pair on documents, trains on what it drafted, and writes router.safetensors and its report to `out`, by
    default beside the drafter, which then uses it. Held-out documents are measured on alone.

    Raises:
        CheckpointError, ConfigError: models that cannot be loaded or do not fit, or too little text.
    """
    info = primary_info(primary_folder)
    if found := mismatches(info, drafter_info(drafter_folder, max_block_length=config.block_length)):
        raise ConfigError("primary and drafter do not fit together: " + "; ".join(found))
    tokenizer = load_tokenizer(primary_folder)
    prompts = _prompts(tokenizer, training, config.num_texts, config)
    unseen = _prompts(tokenizer, held_out, config.num_texts // 2, config)
    primary, drafter = load_decoder(primary_folder).pack(), load_drafter(drafter_folder).pack()
    texts, measured = (
        collect_examples(
            primary,
            drafter,
            write_texts(primary, info, some, config.num_tokens, config.temperature),
            config.block_length,
            config.top_k,
        )
        for some in (prompts, unseen)
    )
    chooses = torch.arange(len(prompts)) % CHOOSES_EVERY == CHOOSES_EVERY - 1
    ms = drafter.decoder if isinstance(drafter, TandemDrafter) else drafter
    model = train_acceptance(texts.texts(~chooses), ms.embedding.detach(), config)
    report = measure_acceptance(model, texts.texts(chooses), measured, ms.embedding, measure_costs(primary, ms, model))
    for policy in _ADAPTIVE:
        model.thresholds[policy] = report["policies"][policy.value]["threshold"]
    folder = out or drafter_folder
    folder.mkdir(parents=True, exist_ok=True)
    file = save_acceptance(model, folder, fingerprint(drafter_folder))
    document = {**report, "config": vars(config), "provenance": provenance()}
    (folder / REPORT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return file


def _prompts(
    tokenizer: Tokenizer, documents: Sequence[Document], num_prompts: int, config: RouterConfig
) -> list[tuple[int, ...]]:
    """Prompts of equal length, out of twice as many documents at most."""
    length = config.prompt_tokens
    some = random.Random(config.seed).sample(documents, min(len(documents), 2 * num_prompts))
    prompts = heldout_prompts(some, tokenizer, num_prompts, min_tokens=length, max_tokens=length)
    return [prompt.token_ids for prompt in prompts]


def train_acceptance(examples: RouterExamples, embedding: Tensor, config: RouterConfig) -> AcceptanceModel:
    """Cross-entropy against the target, over drafts that follow right ones: no others are ever asked about."""
    torch.manual_seed(config.seed)
    model = AcceptanceModel(AcceptanceConfig(embedding.shape[-1], config.top_k, config.hidden_size))
    reached = _reached(examples)
    features = type(examples.features)(*(part[reached] for part in examples.features))
    right = examples.is_right[reached].float()
    labels = right if config.target == "accept" else 1 - examples.total_variation[reached]
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, config.num_steps)
    for _ in range(config.num_steps):
        batch = torch.randint(len(right), (min(config.batch_size, len(right)),))
        some = type(features)(*(part[batch] for part in features))
        loss = F.binary_cross_entropy_with_logits(model.mlp(some, embedding), labels[batch])
        loss = loss + F.binary_cross_entropy_with_logits(model.quick(some.draft_logprob, some.is_sampled), right[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def _reached(examples: RouterExamples) -> Tensor:
    """Which drafts [S, O, G] follow right ones only."""
    return F.pad(examples.is_right, (1, 0), value=True)[..., :-1].long().cumprod(-1).bool()


@torch.inference_mode()
def measure_acceptance(
    model: AcceptanceModel,
    chosen_on: RouterExamples,
    measured: RouterExamples,
    embedding: Tensor,
    costs: Mapping[PolicyName, RoundCosts],
) -> dict[str, Any]:
    """Calibration of each predictor, and what each policy is worth at its own costs. Threshold and fixed length are the
    best ones on some texts, the figures are of others. Predictors are replayed under the other rule, too: what their
    last draft scores, or the product over the block.
    """
    scores, chosen_scores = (_scores(model, examples, embedding) for examples in (measured, chosen_on))
    outcomes = measured.is_right.tolist()
    length = best_fixed(chosen_on.is_right, costs[PolicyName.FIXED])
    fixed = replay(outcomes, fixed_lengths(measured.is_right, length), costs[PolicyName.FIXED])
    policies: dict[str, Any] = {"fixed": {"block_length": length, "tokens_per_s": fixed.tokens_per_s}}
    for policy, compounds in itertools.product(scores, (False, True)):
        cost = costs[policy]
        threshold = best_threshold(chosen_on.is_right, chosen_scores[policy], cost, compounds=compounds)
        replayed = replay(outcomes, block_lengths(scores[policy], threshold, compounds=compounds), cost)
        is_its_own = compounds is (policy is PolicyName.OPTIMAL)
        name = policy.value if is_its_own else f"{policy.value}, by " + ("product" if compounds else "last draft")
        policies[name] = {
            "threshold": threshold,
            "tokens_per_s": replayed.tokens_per_s,
            "over_fixed": replayed.tokens_per_s / fixed.tokens_per_s,
            "drafts_a_round": replayed.num_drafts / replayed.num_rounds,
            "tokens_a_round": replayed.num_tokens / replayed.num_rounds,
        }
    reached = _reached(measured)
    right = measured.is_right[reached]
    return {
        "num_texts": len(outcomes),
        "num_drafts": int(reached.sum()),
        "share_right": float(right.float().mean()),
        "calibration": {p.value: calibration(score[reached], right) for p, score in scores.items()},
        "costs_ms": {policy.value: {n: 1e3 * s for n, s in vars(of_one).items()} for policy, of_one in costs.items()},
        "policies": policies,
    }


def _scores(model: AcceptanceModel, examples: RouterExamples, embedding: Tensor) -> dict[PolicyName, Tensor]:
    """What each policy judges drafts [S, O, G] by."""
    features = examples.features
    return {
        PolicyName.ENTROPY: (1 - (ENTROPY_SCALE * features.entropy).sqrt()).clamp(0, 1),
        PolicyName.ROUTER: model.mlp(features, embedding).sigmoid(),
        PolicyName.OPTIMAL: model.quick(features.draft_logprob, features.is_sampled).sigmoid(),
    }


@torch.inference_mode()
def measure_costs(
    primary: Decoder, ms: Decoder, model: AcceptanceModel, context: int = 192, repetitions: int = 40
) -> dict[PolicyName, RoundCosts]:
    """Times rounds of this pair on this machine, by who ends a block, judging included: MS drafts, then ML verifies, as
    decoding at batch 1 does. Policies differ in what a draft takes, in nothing else.
    """
    kv = KvBuffer(primary.config, context + 32, primary.dtype, primary.device)
    small = KvBuffer(ms.config, context + 32, ms.dtype, ms.device)
    for buffer in (kv, small):
        buffer.planes.zero_()
    scorer = AcceptanceScorer(model, ms)
    rules = {PolicyName.FIXED: None, **{policy: StoppingRule(policy, 0.0) for policy in _ADAPTIVE}}  # never stops
    drafting: dict[PolicyName, dict[int, list[float]]] = {policy: {} for policy in rules}
    verifying: dict[int, list[float]] = {}  # the same work whoever drafted
    for _ in range(repetitions):
        for length, (policy, rule) in itertools.product((1, 4, 8, 16), rules.items()):
            start = time.perf_counter()
            draft_blocks(ms, [DraftJob(small, context, [1], length, SamplingParams(temperature=0.0), rule)], scorer)
            middle = time.perf_counter()
            forward(primary, [Rows(kv, context, [1] * (length + 1), length + 1)]).logits.argmax(-1)
            drafting[policy].setdefault(length, []).append(middle - start)
            verifying.setdefault(length, []).append(time.perf_counter() - middle)
    medians = {policy: _medians(times) for policy, times in drafting.items()}
    verify_0, verify_s = _line(_medians(verifying))
    draft_0, _ = _line(medians[PolicyName.FIXED])
    return {
        policy: RoundCosts(draft_0 + verify_0, _slope(times, draft_0), verify_s) for policy, times in medians.items()
    }


def _medians(times: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {length: median(some) for length, some in times.items()}


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """Intercept and slope through points, least squares; neither is below zero."""
    slope = max(linear_regression(list(points), list(points.values())).slope, 0.0)
    return max(fmean(points.values()) - slope * fmean(points), 0.0), slope


def _slope(points: Mapping[int, float], intercept: float) -> float:
    """Of a line with this intercept, least squares; not below zero."""
    return max(sum(x * (y - intercept) for x, y in points.items()) / sum(x * x for x in points), 0.0)
