"""Evaluation by parallel passes against drafting token by token, and against definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem_serve.bench.eval_options import parse_block_lengths
from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.errors import ConfigError
from tandem_serve.models.decoder import Decoder, causal_attention
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.training.evaluate import OwnTexts, draft_hits, drafting_figures, evaluate_on_text
from tandem_serve.training.generate import continuations
from tandem_serve.training.primary import sequence_logits
from tandem_serve.training.unroll import unroll
from tandem_serve.training.views import primary_view
from tandem_serve.types import SamplingParams
from tests.small_models import small_decoder, small_tandem

_PROMPT = 5


def _half_right_pair() -> tuple[Decoder, TandemDrafter]:
    primary = small_decoder(3, 24, 0)
    drafter = small_tandem(primary)
    with torch.no_grad():  # near copies of the primary's embedding make some drafts right and some wrong
        drafter.decoder.embedding[:, :16] = primary.embedding[:, :16]
    return primary, drafter


def _draft(
    primary: Decoder, drafter: TandemDrafter, text: Tensor, opening: int, length: int, params: SamplingParams
) -> list[int]:
    """Drafts one block token by token, each from a pass over the whole text before it."""
    tokens = text[: opening + 1].tolist()
    for _ in range(length):
        ids = torch.tensor([tokens])
        positions = torch.arange(len(tokens))
        taps = primary(ids, positions, causal_attention(primary.config, len(tokens)), drafter.taps).taps
        blocks = (positions >= opening).long()[None]
        logits = drafter.logits(drafter.forward_blocks(ids, torch.stack(taps, -2), blocks))
        rows = SamplingRows.from_params([(params, len(tokens))])
        tokens.append(int(choose_token_ids(logits[0, -1:], rows).token_ids))
    return tokens[opening + 1 :]


@pytest.mark.parametrize("window", [None, 4])
def test_each_step_says_what_a_block_that_opened_there_would(window: int | None) -> None:
    primary = small_decoder(3, 24, 0)
    drafter = small_tandem(primary, window=window)
    token_ids = torch.randint(37, (2, 14), generator=torch.Generator().manual_seed(1))
    representations = primary_view(primary, token_ids, drafter.taps).representations
    steps = list(unroll(drafter, token_ids, representations, 5))
    for opening in (0, 3, 8):
        blocks = (torch.arange(14) >= opening).long()[None]
        expected = drafter(token_ids, representations, blocks)
        for step, logits in enumerate(steps):
            assert (logits[:, opening + step] - expected[:, opening + step]).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_parallel_drafting_accepts_what_token_by_token_drafting_would(temperature: float) -> None:
    primary, drafter = _half_right_pair()
    prompts = torch.randint(37, (4, _PROMPT), generator=torch.Generator().manual_seed(1))
    texts = OwnTexts(continuations(primary, prompts, 30, temperature=temperature), _PROMPT)
    hits = draft_hits(primary, drafter, texts, 4, temperature)
    figures = drafting_figures([(hits, _PROMPT)], [1, 3])["block_lengths"]["3"]
    blocks = drafted = accepted = runs = 0
    for row, text in enumerate(texts.token_ids):
        opening, params = _PROMPT, SamplingParams(temperature, seed=row)
        runs += 1
        while opening < len(text) - 1:
            length = min(3, len(text) - 2 - opening)
            drafts = _draft(primary, drafter, text, opening, length, params)
            right = [d == int(t) for d, t in zip(drafts, text[opening + 1 :], strict=False)]
            count = right.index(False) if False in right else length
            blocks, drafted, runs = blocks + (length > 0), drafted + length, runs + 1
            accepted, opening = accepted + count, opening + count + 1
    assert figures["num_blocks"] == blocks
    assert 0 < accepted < drafted  # else the comparison shows nothing
    assert figures["accepted_per_block"] == pytest.approx(accepted / blocks)
    assert figures["primary_runs_per_response"] == pytest.approx(runs / 4)
    assert figures["drafter_runs_per_response"] == pytest.approx(drafted / 4)


def test_the_error_of_accepted_drafts_is_that_of_leaving_out_one_response_after_the_other() -> None:
    hits = (
        torch.rand(60, 20, 3, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.1, 0.9, 60)[:, None, None]
    )
    figures = drafting_figures([(hits, 2)], [3])["block_lengths"]["3"]
    without = [
        drafting_figures([(torch.cat((hits[:i], hits[i + 1 :])), 2)], [3])["block_lengths"]["3"]["accepted_per_block"]
        for i in range(60)
    ]
    mean = sum(without) / 60
    jackknife = (59 / 60 * sum((x - mean) ** 2 for x in without)) ** 0.5
    assert figures["accepted_per_block_error"] == pytest.approx(jackknife, rel=0.05)


def test_a_primary_agrees_with_itself() -> None:
    primary = small_decoder(3, 24, 0)
    texts = OwnTexts(continuations(primary, torch.zeros(2, 4, dtype=torch.long), 20), 4)
    figures = drafting_figures([(draft_hits(primary, primary, texts, 4), 4)], [4])["block_lengths"]["4"]
    assert figures["acceptance_rate"] == 1 and figures["agreement"] == 100
    assert figures["primary_runs_per_response"] == 1 + 4  # 1 + 3 blocks of 4 + 1, and one of 3 + 1
    text = evaluate_on_text(primary, primary, [texts.token_ids], [2])["block_lengths"]["2"]
    assert text["agreement"] == 100 and text["total_variation"] == pytest.approx(0, abs=1e-6)


def test_a_block_lengths_figures_are_the_means_over_its_drafts() -> None:
    primary, drafter = _half_right_pair()
    window = torch.randint(37, (2, 20), generator=torch.Generator().manual_seed(2))
    report = evaluate_on_text(primary, drafter, [window], [1, 4])
    agreement = report["by_position"]["agreement"]
    assert report["num_tokens"] == 2 * 16 and len(agreement) == 4 and len(set(agreement)) > 1
    assert report["block_lengths"]["1"]["agreement"] == pytest.approx(agreement[0])
    assert report["block_lengths"]["4"]["agreement"] == pytest.approx(sum(agreement) / 4)
    first = sequence_logits(primary, window[:, :-1])[:, 3:].argmax(-1)
    view = primary_view(primary, window[:, :-1], drafter.taps)
    drafted = next(iter(unroll(drafter, window[:, :-1], view.representations, 1)))[:, 3:].argmax(-1)
    assert agreement[0] == pytest.approx(100 * float((first == drafted).float().mean()))


@pytest.mark.parametrize(("text", "lengths"), [("1..4", (1, 2, 3, 4)), ("8,2,2", (2, 8)), ("1..2,32", (1, 2, 32))])
def test_block_lengths_are_lists_and_ranges(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_block_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "33", "3..1", "a", "1-4"])
def test_other_block_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="block lengths"):
        parse_block_lengths(text)
