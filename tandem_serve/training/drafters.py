"""Training of drafters with the primary frozen: Tandem-CE, then Tandem-Distil; the plain baseline beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tandem_serve.models.checkpoint import (
    atomic_folder,
    fingerprint,
    load_decoder,
    load_drafter,
    load_tokenizer,
    write_model,
)
from tandem_serve.models.decoder import Decoder, DecoderConfig, causal_attention
from tandem_serve.models.tandem import TandemConfig, TandemDrafter, resolve_layer_map
from tandem_serve.training.corpus import Document, corpus_hash
from tandem_serve.training.data import TokenWindows, block_index, encode_documents
from tandem_serve.training.generate import continuations
from tandem_serve.training.losses import distillation_loss
from tandem_serve.training.primary import BatchConfig, sequence_logits
from tandem_serve.training.run_folder import RunFolder
from tandem_serve.training.trainer import Trainer, TrainerConfig

TANDEM, PLAIN = "drafter", "plain-drafter"
_SAMPLED_PROMPT = 32  # tokens of training text that open each text of the primary's own
_SAMPLED_BATCH = 128


@dataclass(frozen=True)
class DrafterConfig:
    """What is trained, and on what. Names both drafters where both are trained, side by side, on the same batches."""

    num_layers: int = 2
    hidden_size: int = 160
    intermediate_size: int = 448
    num_heads: int = 5
    num_kv_heads: int = 5
    layer_map: str = "uniform"
    other_layer_maps: tuple[str, ...] = ()  # further tandem drafters, `drafter-MAP`, to be compared with the first
    block_lengths: tuple[int, int] = (1, 8)
    kinds: tuple[str, ...] = (TANDEM,)
    distillation_weight: float = 0.5
    cross_entropy_share: float = 0.15  # of the steps: stage 1, before the primary's softmax joins
    sampled_tokens: int = 0  # length of the text that the primary writes itself, to be trained on with the corpus
    sampled_share: float = 0.5  # of the steps, that train on it
    start_from: str = ""  # fingerprints of the drafters that a run goes on from, set by train_drafters

    @property
    def layer_maps(self) -> dict[str, str | None]:
        """Every drafter's name and layer map; a plain one has none."""
        names: dict[str, str | None] = {kind: None if kind == PLAIN else self.layer_map for kind in self.kinds}
        return names | {f"{TANDEM}-{layer_map}": layer_map for layer_map in self.other_layer_maps}


class PrimaryView(NamedTuple):
    """What the frozen primary says of a batch."""

    representations: Tensor  # [B, T, num_taps, d_L]
    probabilities: Tensor  # [B, T, V] float32


class DrafterTask:
    """One forward pass of the primary a step, shared by every drafter: equal tokens in equal order by construction."""

    def __init__(
        self,
        primary: Decoder,
        models: Mapping[str, TandemDrafter | Decoder],
        windows: TokenWindows,
        sampled: TokenWindows | None,
        config: DrafterConfig,
        identity: Mapping[str, Any],
        device: str,
    ) -> None:
        self.models: Mapping[str, nn.Module] = models
        self.identity = identity
        self.tokens_per_step = windows.tokens_per_batch
        self._drafters = models
        self._primary = primary
        self._windows = windows
        self._sampled = sampled
        self._config = config
        self._device = device
        self._taps = tuple(sorted({t for m in models.values() if isinstance(m, TandemDrafter) for t in m.taps}))
        # Only the primary: half of a step is its pass, and drafters take longer to compile than compiling them saves.
        self._view = torch.compile(self._run_primary) if identity["compile"] else self._run_primary

    def losses(self, step: int, num_steps: int) -> dict[str, Tensor]:
        batch = self._batch(step).to(self._device)
        token_ids, targets = batch[:, :-1], batch[:, 1:]
        with torch.no_grad():
            view = self._view(token_ids)
        blocks = block_index(step, token_ids.shape[1], self._config.block_lengths, self._windows.seed)
        distils = step >= self._config.cross_entropy_share * num_steps
        weight = self._config.distillation_weight if distils else 0.0
        losses = {}
        for name, drafter in self._drafters.items():
            representations = self._seen_by(drafter, view.representations)
            logits = drafter_logits(drafter, token_ids, representations, blocks.to(self._device))
            losses[name] = distillation_loss(logits, targets, view.probabilities, weight)
        return losses

    def _seen_by(self, drafter: TandemDrafter | Decoder, representations: Tensor) -> Tensor:
        """The taps that one drafter reads, of those that any reads."""
        if not isinstance(drafter, TandemDrafter) or drafter.taps == self._taps:
            return representations
        return representations[..., [self._taps.index(tap) for tap in drafter.taps], :]

    def _batch(self, step: int) -> Tensor:
        """The corpus's windows and the primary's own take turns, evenly, in the proportion asked for."""
        share = self._config.sampled_share if self._sampled else 0.0
        turn = int(step * share)  # sampled batches so far
        if self._sampled and int((step + 1) * share) > turn:
            return self._sampled.batch(turn)
        return self._windows.batch(step - turn)

    def _run_primary(self, token_ids: Tensor) -> PrimaryView:
        num_tokens = token_ids.shape[1]
        attend = causal_attention(self._primary.config, num_tokens, token_ids.device)
        positions = torch.arange(num_tokens, device=token_ids.device)
        hidden, taps = self._primary(token_ids, positions, attend, self._taps)
        representations = torch.stack(taps, -2) if taps else hidden.new_zeros(*hidden.shape[:2], 0, hidden.shape[-1])
        return PrimaryView(representations, self._primary.logits(hidden).float().softmax(-1))


def drafter_logits(
    drafter: TandemDrafter | Decoder, token_ids: Tensor, representations: Tensor, blocks: Tensor
) -> Tensor:
    """Logits [B, T, V] of a drafter for whole sequences. A plain one takes no notice of representations and blocks."""
    if isinstance(drafter, TandemDrafter):
        return drafter.logits(drafter.forward_blocks(token_ids, representations, blocks))
    return sequence_logits(drafter, token_ids)


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
    start_from: Path | None = None,
    details: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Trains the drafters named in config.layer_maps and writes each, in bf16, to `folder/NAME`.

    With `start_from`, a folder that holds a finished drafter of each kind, their weights are where this run begins.
    """
    run = RunFolder(folder)
    if not resume:
        run.clear()
    primary = load_decoder(primary_folder, device=trainer.device)
    separator = primary.config.eos_token_ids[0] if primary.config.eos_token_ids else 0
    corpus = encode_documents(training, load_tokenizer(primary_folder), separator)
    cut = (batches.sequence_length, batches.batch_size, batches.seed)
    windows = TokenWindows(corpus, *cut)
    sampled = (
        TokenWindows(_sampled(run, primary_folder, corpus, config, batches.seed, trainer.device), *cut)
        if config.sampled_tokens
        else None
    )
    if start_from:
        config = replace(config, start_from=" ".join(fingerprint(start_from / name) for name in config.layer_maps))
    primary_fingerprint = fingerprint(primary_folder)
    identity = {
        "data_hash": corpus_hash(training),
        "primary_fingerprint": primary_fingerprint,
        "drafters": json.dumps(asdict(config), sort_keys=True),
        "batches": json.dumps(asdict(batches)),
        "compile": compiled,
    }
    models = {
        name: _build(layer_map, config, primary.config, primary_fingerprint, batches.seed, trainer.device)
        for name, layer_map in config.layer_maps.items()
    }
    if start_from:
        for kind, model in models.items():
            model.load_state_dict(load_drafter(start_from / kind, device=trainer.device).state_dict())
    task = DrafterTask(primary, models, windows, sampled, config, identity, trainer.device)
    run.write_provenance({**(details or {}), **identity, "num_tokens": len(corpus), "num_steps": trainer.num_steps})
    loop = Trainer(task, trainer, run)
    loop.resume()
    loop.run()
    for kind, model in models.items():
        with atomic_folder(folder / kind) as fresh:
            write_model(model.to(torch.bfloat16), fresh, tokenizer_from=primary_folder)
            run.stamp(fresh)
    return [folder / kind for kind in models]


def _build(
    layer_map: str | None, config: DrafterConfig, ml: DecoderConfig, primary_fingerprint: str, seed: int, device: str
) -> TandemDrafter | Decoder:
    """A drafter with fresh weights, plain without a layer map. All share every weight that they have in common."""
    shape = DecoderConfig(
        vocab_size=ml.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=ml.max_position_embeddings,
        tie_word_embeddings=True,
        eos_token_ids=ml.eos_token_ids,
    )
    decoder = Decoder(shape, device=device).init_weights(seed)
    if layer_map is None:
        return decoder
    resolved = resolve_layer_map(layer_map, config.num_layers, ml.num_layers)
    tandem = TandemConfig(resolved, ml.hidden_size, ml.num_layers, primary_fingerprint)
    drafter = TandemDrafter(decoder, tandem).init_projections(seed)
    with torch.no_grad():
        drafter.ff.mul_(50.0)  # MS's input norm undoes the scale; AdamW's step, which is absolute, should not dwarf it
    return drafter


def _sampled(
    run: RunFolder,
    primary_folder: Path,
    corpus: npt.NDArray[np.int32],
    config: DrafterConfig,
    seed: int,
    device: str,
) -> npt.NDArray[np.int32]:
    """The primary's own texts, written once and kept in the run's folder."""
    file = run.path / "sampled.npy"
    if not file.is_file():
        primary = load_decoder(primary_folder, device=device).pack()
        fresh = file.with_name(".sampled.new.npy")
        np.save(fresh, sample_texts(primary, corpus, config.sampled_tokens, seed))
        fresh.replace(file)
    texts: npt.NDArray[np.int32] = np.load(file)
    return texts


def sample_texts(
    primary: Decoder, corpus: npt.NDArray[np.int32], num_tokens: int, seed: int, length: int = 256
) -> npt.NDArray[np.int32]:
    """About num_tokens of the primary's own text, in pieces of `length` that continue bits of the corpus.

    Half of the batches are greedy, half sampled at temperature 0.8: the two ways in which drafters are used.
    """
    random = np.random.default_rng((seed, 2))
    pieces = []
    num_texts = max(1, num_tokens // length)
    for batch, first in enumerate(range(0, num_texts, _SAMPLED_BATCH)):
        starts = random.integers(0, len(corpus) - _SAMPLED_PROMPT, min(_SAMPLED_BATCH, num_texts - first))
        prompts = torch.from_numpy(np.stack([corpus[s : s + _SAMPLED_PROMPT] for s in starts]).astype(np.int64))
        temperature = 0.8 if batch % 2 else 0.0
        texts = continuations(
            primary, prompts.to(primary.device), length - _SAMPLED_PROMPT, temperature=temperature, seed=seed + batch
        )
        pieces.append(texts.cpu().numpy().astype(np.int32).reshape(-1))
    return np.concatenate(pieces)
