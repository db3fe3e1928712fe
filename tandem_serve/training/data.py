"""Token ids as training batches. Everything is a function of (seed, step): resuming needs no state but the step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tandem_serve.errors import ConfigError
from tandem_serve.training.corpus import Document


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer, separator: int) -> npt.NDArray[np.int32]:
    """All documents as one stream of ids, each followed by the separator."""
    encodings = tokenizer.encode_batch([d.text for d in documents])
    parts = [np.array([*e.ids, separator], dtype=np.int32) for e in encodings]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


class TokenWindows:
    """Cuts a stream of ids into shuffled windows of T + 1 ids, which overlap by one (the last is target only).

    Each epoch starts at another offset into the stream, so that windows differ from epoch to epoch, and has its own
    order. `batch` is a pure function of the step. Of several workers, each cuts its own rows of every batch.
    """

    def __init__(
        self,
        token_ids: npt.NDArray[np.int32],
        sequence_length: int,
        batch_size: int,
        seed: int,
        worker: tuple[int, int] = (0, 1),  # rank and number
    ) -> None:
        self._token_ids = token_ids
        self._length = sequence_length
        self._batch_size = batch_size
        self.seed = seed
        self._rank, self._num_workers = worker
        if batch_size % self._num_workers:
            raise ConfigError(f"a batch of {batch_size} sequences cannot be shared by {self._num_workers} workers")
        self._windows_per_epoch = (len(token_ids) - 1 - sequence_length) // sequence_length
        if self._windows_per_epoch < 1:
            raise ConfigError(f"{len(token_ids)} tokens are too few for sequences of {sequence_length}")

    @property
    def tokens_per_batch(self) -> int:
        return self._batch_size * self._length

    @property
    def batches_per_epoch(self) -> int:
        return self._windows_per_epoch // self._batch_size

    def batch(self, step: int) -> Tensor:
        """The batch of a step (from 0), [B, T + 1] int64: B / workers rows, where there are several."""
        first = step * self._batch_size
        rows = range(first + self._rank, first + self._batch_size, self._num_workers)
        starts = [self._start(index) for index in rows]
        windows = np.stack([self._token_ids[s : s + self._length + 1] for s in starts])
        return torch.from_numpy(windows.astype(np.int64))

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self._windows_per_epoch)
        random = np.random.default_rng((self.seed, epoch))
        offset = int(random.integers(self._length))
        return offset + int(random.permutation(self._windows_per_epoch)[place]) * self._length


def block_index(step: int, num_tokens: int, block_lengths: tuple[int, int], seed: int) -> Tensor:
    """Cuts T positions into blocks of one random length and offset for this step: [1, T] int64, non-decreasing.

    The paper trains on blocks of 2 throughout; a drafter trained so falls behind at later positions of longer blocks.
    """
    random = np.random.default_rng((seed, 1, step))
    length = int(random.integers(block_lengths[0], block_lengths[1] + 1))
    offset = int(random.integers(length))
    return ((torch.arange(num_tokens) + offset) // length).unsqueeze(0)


def parse_block_lengths(text: str) -> tuple[int, int]:
    """`2` or `1-8` as (shortest, longest).

    Raises:
        ConfigError: for anything else.
    """
    low, dash, high = text.partition("-")
    try:
        lengths = int(low), int(high if dash else low)
    except ValueError:
        lengths = (0, 0)
    if not 1 <= lengths[0] <= lengths[1]:
        raise ConfigError(f"block lengths {text!r}: expected a number or a range such as 1-8")
    return lengths
