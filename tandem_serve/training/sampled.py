"""The primary's own texts, to train drafters on: acceptance is measured on what the primary writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tandem_serve.models.checkpoint import fingerprint, load_decoder
from tandem_serve.models.decoder import Decoder
from tandem_serve.training.generate import continuations

_PROMPT = 32  # tokens of training text that open each text
_BATCH = 128


def sampled_once(
    folder: Path, primary_folder: Path, corpus: npt.NDArray[np.int32], num_tokens: int, seed: int, device: str
) -> npt.NDArray[np.int32]:
    """`sample_texts`, kept in `folder` for the next resumption, under the name of all that they follow from."""
    source = f"{fingerprint(primary_folder)} {num_tokens} {seed} {len(corpus)} ".encode() + corpus.tobytes()
    file = folder / f"sampled-{hashlib.sha256(source).hexdigest()[:16]}.npy"
    if not file.is_file():
        primary = load_decoder(primary_folder, device=device).pack()
        fresh = file.with_name(f".{file.stem}.new.npy")
        np.save(fresh, sample_texts(primary, corpus, num_tokens, seed))
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
    for batch, first in enumerate(range(0, num_texts, _BATCH)):
        starts = random.integers(0, len(corpus) - _PROMPT, min(_BATCH, num_texts - first))
        prompts = torch.from_numpy(np.stack([corpus[s : s + _PROMPT] for s in starts]).astype(np.int64))
        temperature = 0.8 if batch % 2 else 0.0
        texts = continuations(
            primary, prompts.to(primary.device), length - _PROMPT, temperature=temperature, seed=seed + first
        )
        pieces.append(texts.cpu().numpy().astype(np.int32).reshape(-1))
    return np.concatenate(pieces)
