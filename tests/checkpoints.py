"""Tiny random checkpoints in Hugging Face's format, for any test that needs a model: milliseconds to make and to run.

A random drafter never agrees with a random primary, so the drafters here are made *from* the primary: a copy (whose
drafts are all accepted) with noise on its weights (so that some are not).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandem_serve.models.checkpoint import atomic_folder, fingerprint, load_decoder, write_model
from tandem_serve.models.decoder import Decoder, DecoderConfig
from tandem_serve.models.tandem import TandemConfig, TandemDrafter, resolve_layer_map

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCAB_SIZE = 288
CONFIG = DecoderConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    eos_token_ids=(END_OF_TEXT_ID,),
)
_TEXT = ["def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n", "for i in range(10):\n    print(i)\n"]


def make_primary(path: Path, *, seed: int = 0, config: DecoderConfig = CONFIG) -> Path:
    """A random primary with a byte-level BPE tokenizer of VOCAB_SIZE tokens (end of text: id 0). Returns `path`.

    The weights are wide enough (0.3) for clear margins between logits: rounding never changes which token is best.
    """
    with atomic_folder(path) as folder:
        write_model(Decoder(config).init_weights(seed, std=0.3), folder)
        make_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    return path


def make_drafter(
    path: Path, primary: Path, *, layer_map: str | Sequence[int] | None = None, noise: float = 0.03, seed: int = 1
) -> Path:
    """A tandem drafter made from `primary`. Returns `path`.

    Its MS is the primary with relative `noise` on its weights, and by default MS layer j reads the tap that is layer
    j's own input through an identity FF_Tandem: with noise 0 it computes the very logits of the primary, and every
    draft is accepted. With another `layer_map` ("last", "uniform", "1,2,3" or numbers) it is a poor but valid drafter.
    """
    ms = _noisy_copy(primary, noise, seed)
    layers, hidden = ms.config.num_layers, ms.config.hidden_size
    if layer_map is None:
        layer_map = range(layers)
    spec = layer_map if isinstance(layer_map, str) else ",".join(map(str, layer_map))
    mapped = resolve_layer_map(spec, layers, layers)
    drafter = TandemDrafter(ms, TandemConfig(mapped, hidden, layers, fingerprint(primary)))
    drafter.ff.data.copy_(torch.eye(hidden).repeat(len(mapped[0]), 1))
    with atomic_folder(path) as folder:
        write_model(drafter, folder, tokenizer_from=primary)
    return path


def make_plain_drafter(path: Path, primary: Path, *, noise: float = 0.03, seed: int = 1) -> Path:
    """A plain drafter: the primary with relative `noise` on its weights. Returns `path`."""
    with atomic_folder(path) as folder:
        write_model(_noisy_copy(primary, noise, seed), folder, tokenizer_from=primary)
    return path


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE tokenizer: every string survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _noisy_copy(primary: Path, noise: float, seed: int) -> Decoder:
    decoder = load_decoder(primary)
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(random * parameter.data.std(), alpha=noise)
    return decoder


def with_layers(num_layers: int) -> DecoderConfig:
    """CONFIG with another depth."""
    return replace(CONFIG, num_layers=num_layers, sliding_windows=())
