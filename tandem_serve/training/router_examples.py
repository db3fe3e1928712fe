"""What a router MLP is trained on: every draft of a pair on texts that the primary wrote, and whether it was right.

The primary writes texts with its own engine, so that the shared noise of each position is known. Then MS drafts a block
at every position of every text, by parallel passes: while drafts equal the text, teacher forcing shows MS what its own
drafting would have shown it. Shape letters: S texts, O openings of blocks, G drafts a block, k best ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.decoding.stopping_rules import own_probs
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.errors import TandemError
from tandem_serve.models.acceptance import DraftFeatures, draft_features
from tandem_serve.models.decoder import Decoder, causal_attention
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.drafters import drafter_logits
from tandem_serve.types import GenerationRequest, GenerationStep, PrimaryInfo, SamplingParams


@dataclass(frozen=True)
class RouterTexts:
    """Texts [S, P + T], prompts of equal length included, and how each was sampled."""

    token_ids: Tensor
    prompt_length: int
    sampling: tuple[SamplingParams, ...]


class RouterExamples(NamedTuple):
    """One entry a draft, laid out [S, O, G]: draft g of a block that opens at the o-th token behind the prompt."""

    features: DraftFeatures  # [S, O, G, ...] each
    is_right: Tensor  # bool: the draft is the text's token
    total_variation: Tensor  # between MS's softmax and ML's

    def texts(self, rows: slice | Tensor) -> RouterExamples:
        """Those of some texts alone."""
        return RouterExamples(
            DraftFeatures(*(part[rows] for part in self.features)), self.is_right[rows], self.total_variation[rows]
        )


def write_texts(
    primary: Decoder, info: PrimaryInfo, prompts: Sequence[tuple[int, ...]], num_tokens: int, temperature: float
) -> RouterTexts:
    """Continues prompts of equal length: every other one greedily, the rest at `temperature`; past end-of-text ids."""
    config = PrimaryEngineConfig(max_num_seqs=min(len(prompts), 16), max_num_waiting=len(prompts), block_length=0)
    engine = TorchPrimary(primary, info, config)
    sampling = tuple(SamplingParams(temperature=temperature if i % 2 else 0.0, seed=i) for i in range(len(prompts)))
    texts: list[list[int]] = [list(prompt) for prompt in prompts]

    def sink(number: int, item: GenerationStep | TandemError) -> None:
        if isinstance(item, TandemError):
            raise item
        texts[number] += item.token_ids

    for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        request = GenerationRequest(f"text-{number}", prompt, params, num_tokens)
        engine.submit(request, lambda item, number=number: sink(number, item))  # type: ignore[misc]
    engine.run_until_idle()
    engine.close()
    return RouterTexts(torch.tensor(texts), len(prompts[0]), sampling)


@torch.inference_mode()
def collect_examples(
    primary: Decoder, drafter: TandemDrafter | Decoder, texts: RouterTexts, block_length: int, top_k: int
) -> RouterExamples:
    """Drafts a block of block_length at every position behind the prompts, text by text."""
    parts = [
        _of_text(primary, drafter, texts.token_ids[i : i + 1], texts.prompt_length, params, block_length, top_k)
        for i, params in enumerate(texts.sampling)
    ]
    return RouterExamples(
        DraftFeatures(*(torch.stack(column) for column in zip(*(part.features for part in parts), strict=True))),
        torch.stack([part.is_right for part in parts]),
        torch.stack([part.total_variation for part in parts]),
    )


def _of_text(
    primary: Decoder,
    drafter: TandemDrafter | Decoder,
    text: Tensor,  # [1, P + T]
    prompt_length: int,
    sampling: SamplingParams,
    block_length: int,
    top_k: int,
) -> RouterExamples:
    """One text's examples, [O, G]. One pass for each of the G ways to lay blocks opens one at every position."""
    num_tokens = text.shape[1]
    positions = torch.arange(num_tokens)
    taps = drafter.taps if isinstance(drafter, TandemDrafter) else ()
    hidden, states = primary(text, positions, causal_attention(primary.config, num_tokens), taps)
    ml = primary.logits(hidden[0]).float().softmax(-1)
    representations = torch.stack(states, -2) if states else hidden.unsqueeze(-2)
    rows = SamplingRows.from_params([(sampling, p + 1) for p in range(num_tokens - 1)])
    is_sampled = torch.tensor(rows.is_sampled)
    passes = []
    for shift in range(block_length):
        blocks = ((positions - shift) // block_length + 1).unsqueeze(0)
        logits = drafter_logits(drafter, text, representations, blocks)[0, :-1].float()
        drafts = choose_token_ids(logits, rows)
        variation = (logits.softmax(-1) - ml[:-1]).abs().sum(-1) / 2
        features = draft_features(logits, own_probs(drafts).log(), is_sampled, top_k)
        passes.append((*features, drafts.token_ids == text[0, 1:], variation))
    openings = torch.arange(prompt_length, num_tokens - block_length)[:, None]
    which, where = openings % block_length, openings + torch.arange(block_length)  # [O, 1], [O, G]
    *columns, is_right, variation = (torch.stack(column)[which, where] for column in zip(*passes, strict=True))
    return RouterExamples(DraftFeatures(*columns), is_right, variation)
