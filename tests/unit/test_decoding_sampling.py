"""Drafter-invariant sampling: right distribution, pure noise, filters as vLLM orders them, nothing breaks it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tandem_serve.decoding.sampling import (
    FILTER_DRIFT,
    SamplingRows,
    choose_token_ids,
    filtered_scores,
    gumbel_noise,
)
from tandem_serve.types import SamplingParams

_INT64 = st.integers(-(2**63), 2**63 - 1)
_POSITIONS = st.integers(0, 2**31)


def _noise(seed: int, position: int, vocab_size: int) -> Tensor:
    return gumbel_noise(torch.tensor([seed]), torch.tensor([position]), vocab_size)[0]


def _draws(logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    """The tokens that one row of logits gives at positions 0 .. count - 1."""
    rows = SamplingRows.from_params([(params, position) for position in range(count)])
    return choose_token_ids(logits.expand(count, -1), rows).token_ids


def _kept_ids(scores: list[float], params: SamplingParams) -> set[int]:
    """The filters as their definition reads: one id at a time, in Python floats."""
    weights = [math.exp((score - max(scores)) / params.temperature) for score in scores]
    kept = [v for v in range(len(weights)) if weights[v] >= params.min_p * max(weights)]
    if params.top_k > 0:
        ranking = sorted(weights, reverse=True)
        kth = ranking[min(params.top_k, len(ranking)) - 1]
        kept = [v for v in kept if weights[v] >= kth]
    if params.top_p < 1:
        total, before, least = sum(weights[v] for v in kept), 0.0, math.inf
        for v in sorted(kept, key=lambda v: -weights[v]):
            if before >= params.top_p * total:
                break
            before, least = before + weights[v], weights[v]
        kept = [v for v in kept if weights[v] >= least]
    return set(kept)


# ------------------------------------------------------------------ the noise


def test_noise_matches_reference_splitmix64() -> None:
    """Written out in Python's unbounded integers: pins the wire-visible constants, so a seed keeps its text."""

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    weyl = 0x9E3779B97F4A7C15
    for seed, position in [(0, 0), (1, 2), (-1, 7), (2**63 - 1, 2**40), (-(2**63), 3)]:
        key = mix((mix((seed + weyl) % 2**64) + position * weyl) % 2**64)
        uniforms = [((mix((key + (v + 1) * weyl) % 2**64) >> 12) + 0.5) * 2.0**-52 for v in range(64)]
        expected = torch.tensor([-math.log(-math.log(u)) for u in uniforms], dtype=torch.float64)
        torch.testing.assert_close(_noise(seed, position, 64), expected, rtol=1e-13, atol=1e-13)


@given(st.lists(st.tuples(_INT64, _POSITIONS), min_size=1, max_size=9), st.integers(1, 300), st.data())
@settings(max_examples=60)
def test_noise_is_a_pure_function_of_seed_position_and_id(
    rows: list[tuple[int, int]], vocab_size: int, data: st.DataObject
) -> None:
    """The same numbers alone or in any batch, whatever the vocabulary's size, and always finite."""
    seeds, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    batch = gumbel_noise(seeds, positions, vocab_size)
    row = data.draw(st.integers(0, len(rows) - 1))
    size = data.draw(st.integers(1, vocab_size))
    torch.testing.assert_close(_noise(*rows[row], size), batch[row, :size], rtol=1e-14, atol=1e-14)
    assert torch.isfinite(batch).all() and batch.dtype == torch.float64


def test_noise_is_gumbel_distributed() -> None:
    sample = gumbel_noise(torch.arange(50), torch.arange(50) * 3, 400).flatten()
    assert stats.kstest(sample.numpy(), stats.gumbel_r.cdf).pvalue > 0.01


def test_noise_is_uncorrelated_between_positions_seeds_and_ids() -> None:
    """Neighbouring counters are the hardest case for a counter-based generator: 200 neighbours in both directions."""
    size, counters = 2048, torch.arange(200)
    for seeds, positions in [
        (torch.full((200,), 5), counters),
        (counters, torch.full((200,), 5)),
        (counters, counters),
    ]:
        noise = gumbel_noise(seeds, positions, size)
        correlation = torch.corrcoef(noise).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / math.sqrt(size)  # 6 sigma over 20,000 pairs
        neighbours = torch.corrcoef(torch.stack((noise[:, :-1].flatten(), noise[:, 1:].flatten())))[0, 1]
        assert neighbours.abs() < 5 / math.sqrt(noise.numel())


# ------------------------------------------------------------------ the distribution


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.7, seed=-12),
        SamplingParams(temperature=1.5, top_k=5, seed=13),
        SamplingParams(temperature=1.0, top_p=0.8, seed=14),
        SamplingParams(temperature=0.9, min_p=0.1, top_k=9, top_p=0.95, seed=15),
    ],
)
def test_tokens_follow_the_filtered_softmax(params: SamplingParams) -> None:
    count = 20_000
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)) * 1.5
    kept = sorted(_kept_ids(logits[0].tolist(), params))
    probabilities = (logits[0, kept].double() / params.temperature).softmax(-1)
    observed = _draws(logits, params, count).bincount(minlength=16)
    assert observed.sum() == observed[kept].sum()
    assert stats.chisquare(observed[kept].numpy(), (probabilities * count).numpy()).pvalue > 0.001


def test_tokens_of_different_positions_are_independent() -> None:
    """A 2-D chi-square of consecutive tokens under the same logits."""
    logits = torch.tensor([[0.0, 0.5, 1.0, -0.5]])
    tokens = _draws(logits, SamplingParams(seed=3), 20_001)
    pairs = (tokens[:-1] * 4 + tokens[1:]).bincount(minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(pairs.numpy()).pvalue > 0.001


def test_acceptance_of_a_perturbed_drafter_beats_the_coupling_bound() -> None:
    """Shared noise makes two near models agree: P(equal) >= (1 - TV) / (1 + TV) (arXiv 2408.07978)."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(1, 64, generator=generator) * 2
    draft = target + torch.randn(1, 64, generator=generator) * 0.5
    total_variation = (target.softmax(-1) - draft.softmax(-1)).abs().sum().item() / 2
    equal = _draws(target, SamplingParams(seed=4), 20_000) == _draws(draft, SamplingParams(seed=4), 20_000)
    assert 0.1 < total_variation < 0.5
    assert (1 - total_variation) / (1 + total_variation) < equal.double().mean().item() <= 1 - total_variation + 0.01


# ------------------------------------------------------------------ filters


@given(
    scores=st.lists(st.integers(-12, 12).map(lambda n: n / 3), min_size=1, max_size=24),
    temperature=st.sampled_from([0.3, 0.77, 1.0, 2.3]),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([0.013, 0.21, 0.503, 0.8007, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.017, 0.23, 0.61, 0.97]),
)
@settings(max_examples=300)
def test_filters_equal_a_naive_reference(
    scores: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Many ties (scores in thirds); beside rows that rank fewer ids, more, and none."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    others = [SamplingParams(top_k=3), SamplingParams(top_k=40, top_p=0.5), SamplingParams()]
    for batch in ([params], [params, others[0]], [params, others[1]], [params, *others]):
        rows = SamplingRows.from_params([(p, 0) for p in batch])
        kept = filtered_scores(torch.tensor([scores] * len(batch)), rows)[0].isfinite()
        assert set(kept.nonzero().flatten().tolist()) == _kept_ids(scores, params)


@pytest.mark.parametrize("top_k", [4096, 10**9])
def test_top_k_beyond_the_vocabulary_keeps_all(top_k: int) -> None:
    logits = torch.zeros(1, 8)
    assert set(_draws(logits, SamplingParams(top_k=top_k), 500).tolist()) == set(range(8))


def test_tiny_top_p_and_large_min_p_keep_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    for params in (SamplingParams(top_p=1e-9), SamplingParams(min_p=0.999), SamplingParams(top_k=1)):
        assert set(_draws(logits, params, 200).tolist()) == {1}


# ------------------------------------------------------------------ batches, margins, extremes


@given(st.integers(1, 8), st.integers(0, 2**32), st.data())
@settings(max_examples=60)
def test_a_row_is_chosen_alike_alone_and_in_any_batch(num_rows: int, seed: int, data: st.DataObject) -> None:
    """Greedy and sampled rows, with and without filters, in one batch."""
    logits = torch.randn(num_rows, 50, generator=torch.Generator().manual_seed(seed)).mul(4).round().div(2)
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0]),
        top_p=st.sampled_from([0.9, 1.0]),
        top_k=st.sampled_from([0, 3, 100]),
        min_p=st.sampled_from([0.0, 0.05]),
        seed=_INT64,
    )
    rows = data.draw(st.lists(st.tuples(params, _POSITIONS), min_size=num_rows, max_size=num_rows))
    batch = choose_token_ids(logits, SamplingRows.from_params(rows))
    for row, spec in enumerate(rows):
        alone = choose_token_ids(logits[row : row + 1], SamplingRows.from_params([spec]))
        assert alone.token_ids.item() == batch.token_ids[row].item()
        torch.testing.assert_close(alone.margins, batch.margins[row : row + 1])


def test_advanced_rows_are_those_of_the_next_position() -> None:
    logits = torch.zeros(3, 1000)
    params = [SamplingParams(seed=1), SamplingParams(temperature=0), SamplingParams(seed=2, top_k=7)]
    advanced = SamplingRows.from_params([(p, 4) for p in params]).advanced().advanced()
    expected = SamplingRows.from_params([(p, 6) for p in params])
    assert torch.equal(choose_token_ids(logits, advanced).token_ids, choose_token_ids(logits, expected).token_ids)


def test_margin_is_in_units_of_raw_logits() -> None:
    """Lowering the winner's logit by less than the margin changes nothing, by more changes the choice."""
    generator = torch.Generator().manual_seed(6)
    for temperature in (0.0, 0.4, 2.0):
        logits = torch.randn(1, 12, generator=generator, dtype=torch.float64)
        rows = SamplingRows.from_params([(SamplingParams(temperature=temperature, seed=8), 3)])
        choice = choose_token_ids(logits, rows)
        winner, margin = choice.token_ids.item(), choice.margins.item()
        for change, same in ((0.999, True), (1.001, False)):
            lowered = logits.clone()
            lowered[0, winner] -= margin * change
            assert (choose_token_ids(lowered, rows).token_ids.item() == winner) is same


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    "logits",
    [
        [1.0, math.inf, 2.0, -math.inf],
        [-math.inf, -math.inf, 3.0, -math.inf],
        [-math.inf, 3.4e38, -3.4e38, 0.0],
    ],
)
def test_extreme_logits_never_lose_to_or_draw_a_masked_id(temperature: float, logits: list[float]) -> None:
    best = max(range(4), key=lambda v: logits[v])
    for filters in ({}, {"top_p": 0.5, "top_k": 9, "min_p": 0.1}):
        params = SamplingParams(temperature=temperature, **filters)
        choice = choose_token_ids(torch.tensor([logits]), SamplingRows.from_params([(params, 0)]))
        assert choice.token_ids.item() == best
        assert choice.margins.item() > 0


def test_ties_are_safe() -> None:
    """Two infinite logits, and a row masked out altogether, still give a valid id and a margin that is no NaN."""
    for logits, allowed in (([math.inf, 0.0, math.inf], {0, 2}), ([-math.inf] * 3, {0, 1, 2})):
        for temperature in (0.0, 0.5):
            rows = SamplingRows.from_params([(SamplingParams(temperature=temperature, top_p=0.9), 1)])
            choice = choose_token_ids(torch.tensor([logits]), rows)
            assert choice.token_ids.item() in allowed
            assert choice.margins.item() >= 0


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(3))
    rows = SamplingRows.from_params([(SamplingParams(temperature=1e-6, seed=s), s) for s in range(64)])
    assert torch.equal(choose_token_ids(logits, rows).token_ids, logits.argmax(-1))


def test_one_word_vocabulary_and_row_count_mismatch() -> None:
    rows = SamplingRows.from_params([(SamplingParams(), 0)])
    choice = choose_token_ids(torch.zeros(1, 1), rows)
    assert choice.token_ids.tolist() == [0] and choice.margins.tolist() == [math.inf]
    with pytest.raises(ValueError, match="1 sampling rows for 2 rows"):
        choose_token_ids(torch.zeros(2, 4), rows)


@settings(max_examples=300)
@given(data=st.data())
def test_drift_below_the_margin_changes_nothing_filters_included(data: st.DataObject) -> None:
    """Logits crowd around a few values, so that ids lie at the very edges of top_k, top_p and min_p all the time."""
    levels = data.draw(st.lists(st.sampled_from([0.0, 1.0, 1.5, 3.0]), min_size=2, max_size=8), "levels")
    jitter = st.floats(-2 * FILTER_DRIFT, 2 * FILTER_DRIFT)
    logits = torch.tensor([[level + data.draw(jitter) for level in levels]], dtype=torch.float64)
    kept = logits.softmax(-1).sort(descending=True).values.cumsum(-1)[0]
    edge = float(kept[data.draw(st.integers(0, len(levels) - 2), "edge")])
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0]), "temperature"),
        top_p=data.draw(st.sampled_from([1.0, 0.7, min(edge, 1.0)]), "top_p"),
        top_k=data.draw(st.integers(0, 8), "top_k"),
        min_p=data.draw(st.sampled_from([0.0, 0.1, math.exp(-1.5), math.exp(-0.5)]), "min_p"),
        seed=data.draw(st.integers(0, 2**40), "seed"),
    )
    rows = SamplingRows.from_params([(params, 3)])
    choice = choose_token_ids(logits, rows)
    bound = min(choice.margins.item(), FILTER_DRIFT) / 2.001  # two ids may move towards each other
    drift = torch.tensor([[data.draw(st.sampled_from([-1.0, 0.0, 1.0])) for _ in levels]], dtype=torch.float64)
    moved = choose_token_ids(logits + bound * drift, rows)
    assert moved.token_ids.item() == choice.token_ids.item()


def test_margins_are_rarely_spoilt_by_filters() -> None:
    """What is not near any edge keeps its lead as margin: recomputing near ties must stay rare."""
    logits = torch.randn(2000, 300, generator=torch.Generator().manual_seed(3)) * 2
    rows = SamplingRows.from_params([(SamplingParams(top_p=0.9, top_k=40, min_p=0.01, seed=i), i) for i in range(2000)])
    assert (choose_token_ids(logits, rows).margins == 0).float().mean() < 0.002
