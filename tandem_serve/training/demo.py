"""The demo pair from nothing: what `make train-demo` runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem_serve.models.checkpoint import atomic_folder, load_decoder, load_drafter, load_tokenizer
from tandem_serve.models.decoder import Decoder
from tandem_serve.training.cards import write_drafter_card, write_primary_card
from tandem_serve.training.corpus import STDLIB, STDLIB_HELD_OUT, Document, read_documents, split_held_out
from tandem_serve.training.data import TokenWindows, encode_documents
from tandem_serve.training.drafters import PLAIN, TANDEM
from tandem_serve.training.evaluate import compare
from tandem_serve.training.held_out import heldout_prompts, write_held_out
from tandem_serve.training.run_folder import RunFolder

_TITLES = {TANDEM: "Demo tandem drafter", PLAIN: "Demo plain drafter"}


@dataclass(frozen=True)
class EvaluationSize:
    """How much is measured; the figures of the cards and of docs/lab-notes.md are at these defaults."""

    num_windows: int = 16  # batches of 8 x 256 tokens of held-out text
    num_prompts: int = 100
    prompt_tokens: int = 128
    num_tokens: int = 128  # continuation
    block_length: int = 5


def evaluate_pair(
    primary_folder: Path,
    drafter_folders: dict[str, Path],
    held_out: list[Document],
    size: EvaluationSize = EvaluationSize(),
) -> dict[str, Any]:
    """Measures drafters on held-out documents; the JSON of `train evaluate`."""
    primary, tokenizer = load_decoder(primary_folder), load_tokenizer(primary_folder)
    windows = _windows(held_out, primary, primary_folder, size)
    prompts = heldout_prompts(
        held_out, tokenizer, size.num_prompts, min_tokens=size.prompt_tokens, max_tokens=size.prompt_tokens
    )
    drafters = {name: load_drafter(folder) for name, folder in drafter_folders.items()}
    report = compare(
        primary,
        drafters,
        windows,
        torch.tensor([p.token_ids for p in prompts]),
        num_tokens=size.num_tokens,
        block_length=size.block_length,
    )
    if {TANDEM, PLAIN} <= drafters.keys():
        report["tandem_against_plain"] = _gain(report["drafters"][TANDEM], report["drafters"][PLAIN])
    return report


def assemble_demo(
    primary_run: Path, drafter_run: Path, out: Path, size: EvaluationSize = EvaluationSize()
) -> dict[str, Any]:
    """Gathers the trained models, measured, with cards and heldout.json, as one folder `out`."""
    _, held_out = split_held_out(read_documents(STDLIB), STDLIB_HELD_OUT)
    folders = {TANDEM: drafter_run / TANDEM, PLAIN: drafter_run / PLAIN}
    report = evaluate_pair(primary_run / "model", folders, held_out, size)
    with atomic_folder(out) as fresh:
        shutil.copytree(primary_run / "model", fresh / "primary")
        run = RunFolder(primary_run)
        run.stamp(fresh / "primary")
        write_primary_card(fresh / "primary", run.read_provenance(), report["primary"], _run_s(run))
        run = RunFolder(drafter_run)
        for name, folder in folders.items():
            shutil.copytree(folder, fresh / name)
            figures = report["drafters"][name]
            write_drafter_card(fresh / name, _TITLES[name], run.read_provenance(), figures, _run_s(run))
        write_held_out(fresh / "heldout.json")
        (fresh / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _windows(held_out: list[Document], primary: Decoder, folder: Path, size: EvaluationSize) -> list[Tensor]:
    separator = primary.config.eos_token_ids[0] if primary.config.eos_token_ids else 0
    stream = TokenWindows(encode_documents(held_out, load_tokenizer(folder), separator), 256, 8, seed=0)
    return [stream.batch(step) for step in range(size.num_windows)]


def _gain(tandem: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """What the issue asks of the pair: accepted tokens in percent, agreement in points."""
    ours, theirs = tandem["drafting"], plain["drafting"]
    return {
        "accepted_per_block_percent": 100 * (ours["accepted_per_block"] / theirs["accepted_per_block"] - 1),
        "agreement_points": ours["agreement"] - theirs["agreement"],
        **{
            f"text_agreement_points_{name}": figures["agreement"] - plain["text"][name]["agreement"]
            for name, figures in tandem["text"].items()
        },
    }


def _run_s(run: RunFolder) -> float:
    log = run.read_log()
    return float(log[-1]["elapsed_s"]) if log else 0.0
