"""Drafter-invariant sampling: the token at a position depends on logits, parameters and seed, on nothing else.

    token at position p = argmax over v of   filtered(logits)[v] / T  +  Gumbel(seed, p, v)

The noise comes from a counter-based generator, so primary and drafter draw the same noise for the same position
without exchanging any, and a draft is right iff it *equals* the primary's choice (coupled sampling, arXiv 2408.07978).
Temperature 0 is the same rule without noise. Shape letters: N rows, S of them sampled (not greedy), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tandem_serve.types import SamplingParams


def _signed(value: int) -> int:
    """The int64 with the same 64 bits: torch has no wrapping uint64 arithmetic on every device."""
    return value - (1 << 64) if value >= 1 << 63 else value


# SplitMix64 (Steele, Lea, Flood 2014; the constants of java.util.SplittableRandom).
_WEYL = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _xor_shift_(state: Tensor, bits: int) -> Tensor:
    """state ^= state >>> bits, in place. int64's own shift copies the sign bit; the mask makes it a logical one."""
    return state.bitwise_xor_((state >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _mix_(state: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: every input bit flips every output bit with probability 1/2."""
    _xor_shift_(state, 30).mul_(_MULTIPLIER_1)
    _xor_shift_(state, 27).mul_(_MULTIPLIER_2)
    return _xor_shift_(state, 31)


def gumbel_noise(
    seeds: Tensor,  # [N] int64
    positions: Tensor,  # [N] int64
    vocab_size: int,
) -> Tensor:
    """Standard Gumbel noise [N, V] in float64, a pure function of (seed, position, vocabulary id).

    Integer arithmetic fixes the underlying 52-bit uniforms exactly on every device; the two logarithms agree to the
    last bit or so. It does not depend on the batch, and holds no state. Finite everywhere: between -3.7 and 36.8.
    """
    row_keys = _mix_(_mix_(seeds + _WEYL).add_(positions * _WEYL))
    # The Weyl steps of the whole vocabulary are the same for every row: one [V] table, added to each row's key.
    steps = torch.arange(1, vocab_size + 1, device=seeds.device).mul_(_WEYL)
    bits = _mix_(row_keys[:, None] + steps)
    # 52 bits and a half: exact in float64 and strictly inside (0, 1). A 53rd bit would round up to 1 and give inf.
    uniforms = (bits >> 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)
    return uniforms.log_().neg_().log_().neg_()


# In raw logits: what Choice.margins guards filters against. Float32 sums differ by about 1e-5 between batch shapes.
FILTER_DRIFT = 1e-4


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row of one batch of logits is chosen, as tensors. Greedy rows carry nothing: an argmax needs nothing.

    Built by from_params, which does the branching once in Python so that choose_token_ids never asks the device.
    """

    num_rows: int
    is_sampled: tuple[bool, ...]  # by row
    row_numbers: Tensor  # [S] int64, ascending: which rows are sampled
    temperature: Tensor  # [S, 1] float64, above 0
    top_p: Tensor  # [S, 1] float64; 1 keeps all
    top_k: Tensor  # [S, 1] int64; 0 keeps all
    min_p: Tensor  # [S, 1] float64; 0 keeps all
    seeds: Tensor  # [S] int64
    positions: Tensor  # [S] int64, of the token being chosen
    filters: frozenset[str]  # which of "min_p", "top_k", "top_p" any row uses
    num_ranked: (
        int | None
    )  # how many of the best ids top_k and top_p can need, and one; None: of a row without top_k, all

    @classmethod
    def from_params(
        cls, rows: Sequence[tuple[SamplingParams, int]], device: torch.device | str = "cpu"
    ) -> SamplingRows:
        """One (parameters, position of the token to choose) a row of logits, in the rows' order."""
        sampled = [(row, params, position) for row, (params, position) in enumerate(rows) if params.temperature > 0]
        reals = torch.tensor(
            [(params.temperature, params.top_p, params.min_p) for _, params, _ in sampled],
            dtype=torch.float64,
            device=device,
        ).reshape(-1, 3)
        integers = torch.tensor(
            [(row, params.seed, position, params.top_k) for row, params, position in sampled],
            dtype=torch.int64,
            device=device,
        ).reshape(-1, 4)
        top_ks = [params.top_k for _, params, _ in sampled]
        filters = set()
        for _, params, _ in sampled:
            if params.min_p > 0:
                filters.add("min_p")
            if params.top_k > 0:
                filters.add("top_k")
            if params.top_p < 1:
                filters.add("top_p")
        return cls(
            num_rows=len(rows),
            is_sampled=tuple(params.temperature > 0 for params, _ in rows),
            row_numbers=integers[:, 0],
            temperature=reals[:, 0:1],
            top_p=reals[:, 1:2],
            top_k=integers[:, 3:4],
            min_p=reals[:, 2:3],
            seeds=integers[:, 1],
            positions=integers[:, 2],
            filters=frozenset(filters),
            num_ranked=max(top_ks, default=0) + 1 if all(top_ks) else None,
        )

    def advanced(self) -> SamplingRows:
        """The same rows one position on: what a drafter needs after each draft, without a new from_params."""
        return replace(self, positions=self.positions + 1) if self.row_numbers.shape[0] else self


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen tokens and, for whoever asks, how clear each choice was."""

    token_ids: Tensor  # [N] int64
    is_sampled: tuple[bool, ...]  # N; the others are greedy
    _margins: Callable[[], Tensor]
    _scores: Callable[[], Tensor]

    @property
    def scores(self) -> Tensor:
        """[N, V]: what was compared, noise and filters included; of greedy rows the logits themselves."""
        return self._scores()

    @property
    def margins(self) -> Tensor:
        """[N] float64: best minus second best score, in units of raw logits; inf where only one id was left.

        It says how far the logits of two ids may drift (another batch, kernel or dtype) before the choice changes. 0
        where a drift of FILTER_DRIFT could change it by moving an id across a filter's edge.
        Worked out on each access, from the logits themselves: ask before their buffer is written again.
        """
        return self._margins()


def choose_token_ids(
    logits: Tensor,  # [N, V] float32
    rows: SamplingRows,
) -> Choice:
    """Chooses one token a row. Any logits are safe: infinite ones too, and a temperature near 0 is greedy's limit.

    Equal logits go to the lowest id where greedy. Filters apply in vLLM's order: temperature, min_p, top_k, top_p.
    """
    if rows.num_rows != logits.shape[0]:
        raise ValueError(f"{rows.num_rows} sampling rows for {logits.shape[0]} rows of logits")
    num_sampled = rows.row_numbers.shape[0]
    if num_sampled == 0:
        return _choose(logits, rows.is_sampled)
    if num_sampled == rows.num_rows:
        return _sample(logits, rows)
    greedy, sampled = _choose(logits, rows.is_sampled), _sample(logits[rows.row_numbers], rows)
    return Choice(
        greedy.token_ids.index_copy(0, rows.row_numbers, sampled.token_ids),
        rows.is_sampled,
        lambda: greedy.margins.index_copy(0, rows.row_numbers, sampled.margins),
        lambda: logits.double().index_copy(0, rows.row_numbers, sampled.scores),
    )


def _choose(scores: Tensor, is_sampled: tuple[bool, ...]) -> Choice:
    """The best id of each row [N, V]; the lowest id wins a tie (torch.max promises it, and is faster than argmax)."""
    return Choice(scores.max(dim=-1).indices, is_sampled, lambda: _lead(scores), lambda: scores)


def _lead(scores: Tensor) -> Tensor:
    """Best minus second best score of each row, [N] float64."""
    if scores.shape[-1] == 1:
        return torch.full(scores.shape[:1], torch.inf, dtype=torch.float64, device=scores.device)
    best, second = scores.topk(2, dim=-1).values.double().unbind(-1)
    return torch.where(best == second, 0.0, best - second)  # inf - inf is a tie, not a NaN


def _sample(logits: Tensor, rows: SamplingRows) -> Choice:
    """argmax(filtered(logits) / T + noise), all rows [S, V] sampled."""
    noise = gumbel_noise(rows.seeds, rows.positions, logits.shape[-1])
    choice = _choose(filtered_scores(logits, rows).add_(noise), (True,) * logits.shape[0])

    def margins() -> Tensor:
        lead = choice.margins * rows.temperature[:, 0]
        if not rows.filters:
            return lead
        return torch.where(_is_clear_of_edges(_scores(logits, rows), noise, rows, choice.token_ids), lead, 0.0)

    return Choice(choice.token_ids, choice.is_sampled, margins, lambda: choice.scores)


def filtered_scores(
    logits: Tensor,  # [S, V], the sampled rows alone
    rows: SamplingRows,
) -> Tensor:
    """logits / T, less each row's best: [S, V] float64, -inf where a filter drops the id. Its softmax is sampled."""
    scores = _scores(logits, rows)
    if rows.filters:
        scores.masked_fill_(scores < _score_floor(scores, rows), -torch.inf)
    return scores


def _scores(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits / T, less each row's best, before any filter."""
    best = logits.amax(dim=-1, keepdim=True)
    # Relative to the best id, whose score is exactly 0 whatever its logit: neither inf - inf nor a tiny T overflows.
    return torch.where(logits == best, 0.0, logits.double() - best).div_(rows.temperature)


def _is_clear_of_edges(scores: Tensor, noise: Tensor, rows: SamplingRows, token_ids: Tensor) -> Tensor:
    """Rows [S] whose choice stays the same should logits drift by FILTER_DRIFT: kept by slightly stricter filters too,
    and still the best under slightly looser ones."""
    slack = (FILTER_DRIFT / rows.temperature).clamp(max=1e9)
    strictest = _score_floor(scores, rows, -slack)
    if scores.shape[-1] > 1:  # no filter ever drops the best id: where it leads by slack, it stays both
        strictest = strictest.minimum(scores.topk(2, dim=-1).values[:, 1:] + slack)
    is_kept = scores.gather(-1, token_ids[:, None]) >= strictest
    loosened = (scores + noise).masked_fill_(scores < _score_floor(scores, rows, slack), -torch.inf)
    return is_kept[:, 0] & (loosened.argmax(dim=-1) == token_ids)


def _score_floor(scores: Tensor, rows: SamplingRows, slack: Tensor | None = None) -> Tensor:
    """The score [S, 1] below which a row's filters drop an id: each of the three keeps a top part of the ranking.

    scores [S, V] are logits / T with 0 for the best id. Ids that tie with the last one kept are kept too, so that
    neither sort order nor batch decides. top_p is of the mass that min_p and top_k have left, as in vLLM.

    With a slack [S, 1]: the lowest floor that the scores could have after drifting by so much, where it is positive;
    the highest one where it is negative.
    """
    slack = torch.zeros_like(rows.temperature) if slack is None else slack
    floor = rows.min_p.log() - slack  # p / p_best >= min_p, as a difference of scores; -inf where off
    if rows.filters == {"min_p"}:
        return floor
    vocab_size = scores.shape[-1]
    ranked = scores.topk(min(rows.num_ranked or vocab_size, vocab_size), dim=-1).values  # [S, R], best first
    if "top_k" in rows.filters:
        in_top_k = torch.where(rows.top_k > 0, rows.top_k, vocab_size)
        floor = floor.maximum(_floor_at_rank(ranked, in_top_k, slack))
    if "top_p" in rows.filters:
        weights = ranked.masked_fill(ranked < floor, -torch.inf).exp()
        # Summed over the vocabulary, since R may end among the k-th's ties: the batch must not sway a row.
        mass = scores.masked_fill(scores < floor, -torch.inf).exp().sum(dim=-1, keepdim=True)
        share = rows.top_p + 2 * slack  # a share of the mass drifts by twice the scores' drift at most, relatively
        num_kept = (weights.cumsum(dim=-1) - weights < share * mass).sum(dim=-1, keepdim=True)
        floor = torch.where(rows.top_p < 1, floor.maximum(_floor_at_rank(ranked, num_kept, slack)), floor)
    return floor


def _floor_at_rank(ranked: Tensor, ranks: Tensor, slack: Tensor) -> Tensor:
    """The floor [S, 1] that keeps the `rank` best of rows [S, R] sorted best first; ranks [S, 1] count from 1.

    A rank past R means R. Loosened (slack > 0): whatever comes within slack of the last one is kept, too. Tightened:
    the last one is kept only where it leads the next by as much.
    """
    last = ranked.gather(-1, ranks.clamp(1, ranked.shape[-1]) - 1)
    following = ranked.gather(-1, ranks.clamp(1, ranked.shape[-1] - 1)) if ranked.shape[-1] > 1 else last
    tightened = torch.where(ranks < ranked.shape[-1], last.maximum(following - slack), last)
    return torch.where(slack < 0, tightened, last - slack)
