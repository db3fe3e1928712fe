"""Pretraining of a primary: tokenizer, next-token loss, a Hugging Face folder at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import atomic_folder, load_tokenizer, write_model
from tandem_serve.models.decoder import Decoder, DecoderConfig, causal_attention
from tandem_serve.training.corpus import Document, corpus_hash
from tandem_serve.training.data import TokenWindows, encode_documents
from tandem_serve.training.losses import next_token_loss
from tandem_serve.training.run_folder import RunFolder
from tandem_serve.training.tokenizer import END_OF_TEXT_ID, save_tokenizer, train_tokenizer
from tandem_serve.training.trainer import Trainer, TrainerConfig
from tandem_serve.training.workers import leader_first, leads, worker


@dataclass(frozen=True)
class BatchConfig:
    """How the stream of tokens is cut."""

    sequence_length: int = 512
    batch_size: int = 16
    seed: int = 0


class PrimaryTask:
    """Next-token prediction on whole windows."""

    def __init__(self, decoder: Decoder, windows: TokenWindows, identity: Mapping[str, Any], device: str) -> None:
        self.identity = identity
        self.models: Mapping[str, nn.Module] = {"primary": decoder}
        self.tokens_per_step = windows.tokens_per_batch
        self._windows = windows
        self._device = device
        self._logits = torch.compile(self._forward) if identity["compile"] else self._forward
        self._decoder = decoder

    def losses(self, step: int, num_steps: int) -> dict[str, Tensor]:
        batch = self._windows.batch(step).to(self._device)
        return {"primary": next_token_loss(self._logits(batch[:, :-1]), batch[:, 1:])}

    def _forward(self, token_ids: Tensor) -> Tensor:
        return sequence_logits(self._decoder, token_ids)


def sequence_logits(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of whole sequences [B, T] from position 0."""
    num_tokens = token_ids.shape[1]
    positions = torch.arange(num_tokens, device=token_ids.device)
    attend = causal_attention(decoder.config, num_tokens, token_ids.device)
    return decoder.logits(decoder(token_ids, positions, attend).hidden)


def train_primary(
    folder: Path,
    training: Sequence[Document],
    shape: DecoderConfig,
    batches: BatchConfig,
    trainer: TrainerConfig,
    *,
    resume: bool = True,
    compiled: bool = False,
    tokenizer_from: Path | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Trains a primary and writes it, in bf16, to `folder/model`. The tokenizer is made first and kept, or that of
    another model is taken.

    bf16 because that is what gets served: drafters must be trained against the rounded weights.
    """
    run = RunFolder(folder)
    with leader_first():
        if leads():
            run.lock()
        if leads() and not resume:
            run.clear()
        tokenizer = _tokenizer(run, training, shape, tokenizer_from)
    token_ids = encode_documents(training, tokenizer, END_OF_TEXT_ID)
    windows = TokenWindows(token_ids, batches.sequence_length, batches.batch_size, batches.seed, worker())
    identity = {
        "data_hash": corpus_hash(training),
        "shape": json.dumps(asdict(shape), sort_keys=True),
        "batches": json.dumps(asdict(batches)),
        "compile": compiled,
    }
    decoder = Decoder(shape, device=trainer.device).init_weights(batches.seed)
    task = PrimaryTask(decoder, windows, identity, trainer.device)
    if leads():
        sizes = {"num_tokens": len(token_ids), "num_steps": trainer.num_steps}
        run.write_provenance({**(details or {}), **identity, **sizes})
    loop = Trainer(task, trainer, run)
    loop.resume()
    loop.run()
    if not leads():
        return folder / "model"
    with atomic_folder(folder / "model") as fresh:
        write_model(decoder.to(torch.bfloat16), fresh, tokenizer_from=folder / "tokenizer")
        run.stamp(fresh)
    return folder / "model"


def _tokenizer(
    run: RunFolder, training: Sequence[Document], shape: DecoderConfig, tokenizer_from: Path | None
) -> Tokenizer:
    folder = run.path / "tokenizer"
    if tokenizer_from is not None:
        found = load_tokenizer(tokenizer_from)
        if found.get_vocab_size() > shape.vocab_size:
            raise ConfigError(f"{tokenizer_from}: {found.get_vocab_size()} tokens are more than --vocab-size")
        save_tokenizer(found, folder, max_positions=shape.max_position_embeddings)
    elif not (folder / "tokenizer_config.json").is_file():
        save_tokenizer(
            train_tokenizer((d.text for d in training), shape.vocab_size),
            folder,
            max_positions=shape.max_position_embeddings,
        )
    return load_tokenizer(folder)
