"""Training of drafters: Tandem-CE, then Tandem-Distil; the plain baseline and peers beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import atomic_folder, fingerprint, load_decoder, load_tokenizer, write_model
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemConfig, TandemDrafter, resolve_layer_map
from tandem_serve.training.corpus import Document, corpus_hash
from tandem_serve.training.data import TokenWindows, encode_documents
from tandem_serve.training.drafter_task import (
    FROZEN,
    PLAIN,
    PRIMARY,
    DrafterConfig,
    DrafterTask,
    Trained,
    drafter_logits,
)
from tandem_serve.training.initial import initial_decoder
from tandem_serve.training.peers.catalog import PEERS, build_peer, load_any, save_peer
from tandem_serve.training.peers.peer import Peer
from tandem_serve.training.primary import BatchConfig
from tandem_serve.training.run_folder import RunFolder
from tandem_serve.training.sampled import sampled_once
from tandem_serve.training.trainer import Trainer, TrainerConfig
from tandem_serve.training.workers import leader_first, leads, shard_layers, worker

__all__ = ["drafter_logits", "train_drafters"]


def train_drafters(
    folder: Path,
    primary_folder: Path,
    training: Sequence[Document],
    config: DrafterConfig,
    batches: BatchConfig,
    trainer: TrainerConfig,
    *,
    resume: bool = True,
    compiled: bool = False,
    shard_primary: bool = False,
    start_from: Path | None = None,
    details: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Trains the drafters that config.names and writes each, in bf16, to `folder/NAME`; a primary that was trained
    along goes to `folder/primary`, and the drafter names that one as its own.

    Where several workers run this (workers.py), `shard_primary` spreads the frozen primary's layers over them.
    With `start_from`, a folder that holds a finished drafter of each name, their weights are where this run begins.
    """
    run = RunFolder(folder)
    if leads():
        run.lock()
    if leads() and not resume:
        run.clear()
    primary = load_decoder(primary_folder, device=trainer.device)
    separator = primary.config.eos_token_ids[0] if primary.config.eos_token_ids else 0
    corpus = encode_documents(training, load_tokenizer(primary_folder), separator)
    cut = (batches.sequence_length, batches.batch_size, batches.seed, worker())
    sampled = None
    with leader_first():
        if config.sampled_tokens:
            texts = sampled_once(folder, primary_folder, corpus, config.sampled_tokens, batches.seed, trainer.device)
            sampled = TokenWindows(texts, *cut)
    drafters = {
        name: _build(variant.kind, variant.layer_map, config, primary, fingerprint(primary_folder), batches.seed)
        for name, variant in config.names.items()
    }
    if start_from:
        config = replace(config, start_from=" ".join(_begin_with(start_from, drafters, primary)))
    if config.init_from:
        config = replace(config, init_from=fingerprint(config.init_from))
    identity = {
        "data_hash": corpus_hash(training),
        "primary_fingerprint": fingerprint(primary_folder),
        "drafters": json.dumps(asdict(config), sort_keys=True),
        "batches": json.dumps(asdict(batches)),
        "compile": compiled,
    }
    if shard_primary:
        if compiled or config.train_primary != FROZEN:
            raise ConfigError("only a frozen primary that is not compiled can be sharded")
        shard_layers(primary)
    task = DrafterTask(primary, drafters, TokenWindows(corpus, *cut), sampled, config, identity, trainer.device)
    if leads():
        sizes = {"num_tokens": len(corpus), "num_steps": trainer.num_steps}
        run.write_provenance({**(details or {}), **identity, **sizes})
    loop = Trainer(task, trainer, run)
    loop.resume()
    loop.run()
    if leads():
        _write_all(folder, primary_folder, primary, drafters, config, run)
    return [folder / name for name in drafters]


def _write_all(
    folder: Path,
    primary_folder: Path,
    primary: Decoder,
    drafters: Mapping[str, Trained],
    config: DrafterConfig,
    run: RunFolder,
) -> None:
    if config.train_primary != FROZEN:
        _write(primary, folder / PRIMARY, primary_folder, run)
        _rename_primary(drafters, fingerprint(folder / PRIMARY))
    for name, drafter in drafters.items():
        _write(drafter, folder / name, primary_folder, run, variant=config.names[name]._asdict())


def _build(
    kind: str, layer_map: str, config: DrafterConfig, primary: Decoder, primary_fingerprint: str, seed: int
) -> Trained:
    """A drafter with the weights that it begins with. All share every weight that they have in common."""
    if kind in PEERS:
        return build_peer(kind, primary, config.shape, config.block_lengths[1], seed)
    ml, device = primary.config, str(primary.device)
    decoder = initial_decoder(
        config.shape, ml, seed=seed, device=device, init_from=config.init_from, init_layers=config.init_layers
    )
    if kind == PLAIN:
        return decoder
    resolved = resolve_layer_map(layer_map, decoder.config.num_layers, ml.num_layers)
    tandem = TandemConfig(resolved, ml.hidden_size, ml.num_layers, primary_fingerprint)
    drafter = TandemDrafter(decoder, tandem).init_projections(seed)
    with torch.no_grad():
        drafter.ff.mul_(50.0)  # MS's input norm undoes the scale; AdamW's step, which is absolute, should not dwarf it
    return drafter


def _begin_with(folder: Path, drafters: Mapping[str, Trained], primary: Decoder) -> list[str]:
    """Takes over the weights of a finished run's drafters. Returns what names them."""
    for name, drafter in drafters.items():
        found = load_any(str(folder / name), primary, str(primary.device))
        drafter.load_state_dict(found.state_dict())  # type: ignore[union-attr]
    return [name if isinstance(d, Peer) else fingerprint(folder / name) for name, d in drafters.items()]


def _rename_primary(drafters: Mapping[str, Trained], primary_fingerprint: str) -> None:
    for drafter in drafters.values():
        if isinstance(drafter, TandemDrafter):
            drafter.config = replace(drafter.config, primary_fingerprint=primary_fingerprint)


def _write(model: Trained, folder: Path, primary_folder: Path, run: RunFolder, **details: Any) -> None:
    with atomic_folder(folder) as fresh:
        if isinstance(model, Peer):
            save_peer(model, fresh)
        else:
            write_model(model.to(torch.bfloat16), fresh, tokenizer_from=primary_folder)
        run.stamp(fresh, **details)
