"""`tandem-serve eval`: a primary and its drafters on text that they were not trained on, as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import fingerprint, load_decoder, load_tokenizer
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.corpus import Document
from tandem_serve.training.couplings import TEMPERATURES, measure_couplings
from tandem_serve.training.data import TokenWindows, encode_documents
from tandem_serve.training.evaluate import OwnTexts, draft_hits, drafting_figures, evaluate_on_text, evaluate_primary
from tandem_serve.training.generate import continuations
from tandem_serve.training.held_out import HELD_OUT, evaluation_documents, heldout_prompts, read_jsonl
from tandem_serve.training.peers.catalog import load_any, runs_of
from tandem_serve.training.peers.peer import Peer
from tandem_serve.training.peers.prompt_lookup import PromptLookup
from tandem_serve.training.run_folder import provenance
from tandem_serve.training.unroll import Drafter

KIND = "eval"
_WINDOW_BATCH = 8


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured, and how much of it; the defaults are those of the demo pair's cards."""

    data: str = HELD_OUT  # see held_out.evaluation_documents
    field: str = "prompt"
    prompts: str = ""  # a JSONL file whose `field` is continued; empty: prompts are cut from `data`, or its lines
    block_lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    temperatures: tuple[float, ...] = (0.0,)  # of the primary's own texts
    num_windows: int = 16  # batches of 8 windows of held-out text
    window_tokens: int = 256
    num_prompts: int = 100
    prompt_tokens: int = 128
    num_tokens: int = 128  # continuation
    couplings: bool = False
    coupling_temperatures: tuple[float, ...] = TEMPERATURES
    device: str = "cpu"


def evaluate_pair(
    primary_folder: Path,
    drafter_folders: Mapping[str, str],
    plan: EvaluationPlan,
    announce: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measures drafters on text of the plan; `announce` hears what is going on.

    Raises:
        ConfigError: where there is too little text for one window or prompt.
    """
    primary, tokenizer = load_decoder(primary_folder, device=plan.device), load_tokenizer(primary_folder)
    documents = evaluation_documents(plan.data, plan.field, primary_folder)
    windows = [w.to(plan.device) for w in text_windows(documents, primary, tokenizer, plan)]
    announce("the primary on held-out text")
    report: dict[str, Any] = {
        "kind": KIND,
        "primary": {**evaluate_primary(primary, windows), "num_parameters": _num_parameters(primary)},
        "drafters": {},
        "primary_fingerprint": fingerprint(primary_folder),
        "plan": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(plan).items()},
        "provenance": provenance(),
    }
    drafters = {name: load_any(folder, primary, plan.device) for name, folder in drafter_folders.items()}
    for name, drafter in drafters.items():
        if isinstance(drafter, TandemDrafter) and drafter.config.primary_fingerprint != report["primary_fingerprint"]:
            raise ConfigError(f"drafter {name} was trained for another primary than {primary_folder}")
    prompts = _prompts(documents, tokenizer, plan)
    own_texts = {}
    for temperature in plan.temperatures:
        announce(f"the primary's own texts at temperature {temperature:g}")
        own_texts[temperature] = [
            OwnTexts(continuations(primary, p, plan.num_tokens, temperature=temperature), p.shape[1]) for p in prompts
        ]
    for name, folder in drafter_folders.items():
        announce(name)
        drafter = drafters[name]
        measured = _measure(primary, drafter, windows, own_texts, plan)
        report["drafters"][name] = {"type": _type(drafter), "training": _training(folder), **measured}
        if plan.couplings and not isinstance(drafter, PromptLookup):
            announce(f"{name}: couplings")
            report["drafters"][name]["couplings"] = measure_couplings(
                primary, drafter, windows, prompts[-1], temperatures=plan.coupling_temperatures
            )
    return report


def _measure(
    primary: Decoder,
    drafter: Drafter | PromptLookup,
    windows: Sequence[Tensor],
    own_texts: Mapping[float, Sequence[OwnTexts]],
    plan: EvaluationPlan,
) -> dict[str, Any]:
    longest = max(plan.block_lengths)
    drafting = {}
    for temperature, texts in own_texts.items():
        hits = [(draft_hits(primary, drafter, t, longest, temperature), t.prompt_length) for t in texts]
        drafting[f"{temperature:g}"] = drafting_figures(hits, plan.block_lengths, runs_of(drafter))
    figures: dict[str, Any] = {"num_parameters": _num_parameters(drafter), "drafting": drafting}
    if isinstance(drafter, PromptLookup):
        return figures
    return {**figures, "text": evaluate_on_text(primary, drafter, windows, plan.block_lengths)}


def _type(drafter: Drafter | PromptLookup) -> str:
    if isinstance(drafter, Peer | PromptLookup):
        return drafter.kind
    return "tandem" if isinstance(drafter, TandemDrafter) else "plain"


def _training(folder: str) -> dict[str, Any]:
    """What a drafter's provenance says of its training; empty where there is none. Its own layer map and block lengths
    where others were trained beside it.
    """
    file = Path(folder) / "provenance.json"
    if not file.is_file():
        return {}
    record = json.loads(file.read_text("utf-8"))
    batches = json.loads(record.get("batches", "{}"))
    tokens_per_step = batches.get("batch_size", 0) * batches.get("sequence_length", 0)
    tokens = record.get("num_steps", 0) * tokens_per_step
    config = {**json.loads(record.get("drafters", "{}")), **record.get("variant", {})}
    return {"num_steps": record.get("num_steps"), "num_tokens": tokens, **config}


def _num_parameters(model: object) -> int:
    return sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0


def text_windows(
    documents: Sequence[Document], primary: Decoder, tokenizer: Tokenizer, plan: EvaluationPlan
) -> list[Tensor]:
    """The same windows for the same text and plan; no more than one epoch of them."""
    separator = primary.config.eos_token_ids[0] if primary.config.eos_token_ids else 0
    stream = encode_documents(documents, tokenizer, separator)
    windows = TokenWindows(stream, plan.window_tokens, _WINDOW_BATCH, seed=0)
    return [windows.batch(step) for step in range(min(plan.num_windows, max(1, windows.batches_per_epoch)))]


def _prompts(documents: Sequence[Document], tokenizer: Tokenizer, plan: EvaluationPlan) -> list[Tensor]:
    """Prompts of equal length together, [B, P] each, the longest last. Those of a file keep their end, a power of two
    tokens long."""
    source = plan.prompts or (plan.data if plan.data.endswith(".jsonl") else "")
    if not source:
        length = plan.prompt_tokens
        cut = heldout_prompts(documents, tokenizer, plan.num_prompts, min_tokens=length, max_tokens=length)
        return [torch.tensor([prompt.token_ids for prompt in cut], device=plan.device)]
    by_length: dict[int, list[list[int]]] = {}
    for text in read_jsonl(Path(source), plan.field, plan.num_prompts):
        token_ids = tokenizer.encode(text).ids
        length = 1 << (min(len(token_ids), plan.prompt_tokens).bit_length() - 1) if token_ids else 0
        if length:
            by_length.setdefault(length, []).append(token_ids[-length:])
    if not by_length:
        raise ConfigError(f"{source}: every prompt is empty")
    return [torch.tensor(ids, device=plan.device) for _, ids in sorted(by_length.items())]
