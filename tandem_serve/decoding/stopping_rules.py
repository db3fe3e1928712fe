"""When a block of drafts ends: the drafter's side of block_policy.py.

Scores come from tensors, a batch at a time; what follows from them is decided in plain Python, a number a block: a
small MS makes thousands of drafts a second, and a tensor operation costs as much as a good part of one.
Shape letters: B blocks being drafted, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import Choice
from tandem_serve.types import PolicyName, StoppingRule


class Scorer(Protocol):
    """Says how likely drafts are right."""

    @property
    def thresholds(self) -> Mapping[PolicyName, float]:
        """StoppingRule.threshold where the rule leaves it open."""
        ...

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> list[float]:
        """Scores, 0 to 1, of B drafts that were chosen by logits [B, V]."""
        ...


# Where nobody has measured better ones.
DEFAULT_THRESHOLDS: Mapping[PolicyName, float] = {
    PolicyName.ENTROPY: 0.1,
    PolicyName.ROUTER: 0.4,
    PolicyName.OPTIMAL: 0.3,
}
ENTROPY_SCALE = 0.2
_TEXT_RATE, _LARGEST_SHIFT = 0.15, 3.0  # of TextOdds


def entropy_score(logits: Tensor) -> Tensor:
    """A bound on acceptance from the drafter's entropy H in nats: 1 - sqrt(0.2 H), [B] (after AdaEDL)."""
    entropy: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
    return (1 - (ENTROPY_SCALE * entropy).sqrt()).clamp_(0, 1)


def own_probs(drafts: Choice) -> Tensor:
    """How clearly MS prefers its drafts: the softmax, at them, of the scores that they were chosen by; [B] float32.

    Greedy, that is MS's own probability. Sampled, the scores hold the noise that the primary will add as well: a draft
    that wins by chance alone is close to the next one, where the primary's logits may decide otherwise.
    """
    probs: Tensor = drafts.scores.float().softmax(-1).gather(-1, drafts.token_ids.unsqueeze(-1))[:, 0]
    return probs


def own_odds(drafts: Choice) -> list[float]:
    """A fair guess of acceptance without training: own_probs where sampled, their cube root where greedy.

    For the demo pair 0.05, 0.3 and 0.5 are accepted in 12, 39 and 58 % of cases where sampled, in 40, 69 and 89 % where
    greedy. Ranks drafts better than entropy does.
    """
    probs = own_probs(drafts).tolist()
    return [p if sampled else p ** (1 / 3) for p, sampled in zip(probs, drafts.is_sampled, strict=True)]


class UntrainedScorer:
    """The Scorer of a drafter that has no acceptance model: entropy, and its own odds for optimal stopping."""

    thresholds = DEFAULT_THRESHOLDS

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> list[float]:
        """See Scorer."""
        if policy is PolicyName.OPTIMAL:
            return own_odds(drafts)
        scores: list[float] = entropy_score(logits).tolist()
        return scores


UNTRAINED = UntrainedScorer()


@dataclass(slots=True)
class TextOdds:
    """How much likelier than scored one text's drafts have proved, in log-odds; learnt as the text is verified.

    Scores are calibrated over many texts, and one that repeats itself is easier than they say. A step of gradient
    descent on the cross-entropy for each draft that was reached.
    """

    shift: float = 0.0
    _first_position: int = 0  # of the last block
    _drafts: Sequence[int] = ()
    _scores: Sequence[float] = ()

    def adjust(self, score: float) -> float:
        """A draft's chance to be right, given its score."""
        score = min(max(score, 1e-6), 1 - 1e-6)
        return 1 / (1 + (1 - score) / score * math.exp(-self.shift))

    def expect(self, first_position: int, drafts: Sequence[int], scores: Sequence[float]) -> None:
        """A block has been drafted; its adjusted scores, of which the last may be missing."""
        self._first_position, self._drafts, self._scores = first_position, drafts, scores

    def learn(self, start_position: int, token_ids: Sequence[int]) -> None:
        """The primary has chosen these, from that position on."""
        skipped = self._first_position - start_position
        if self._scores and 0 <= skipped < len(token_ids):
            for token_id, draft, score in zip(token_ids[skipped:], self._drafts, self._scores, strict=False):
                self.shift += _TEXT_RATE * ((token_id == draft) - score)
                if token_id != draft:
                    break
            self.shift = min(max(self.shift, -_LARGEST_SHIFT), _LARGEST_SHIFT)
        self._drafts = self._scores = ()


@dataclass(slots=True)
class _Block:
    """One block's rule and how it stands."""

    policy: PolicyName
    threshold: float
    keep_threshold: float
    step_cost: float
    odds: TextOdds | None
    draft_scores: list[float] = field(default_factory=list)  # one by one, of optimal stopping
    score: float = 1.0  # of its last draft; under optimal stopping of all of them: the chance that all are right

    def add(self, score: float) -> None:
        """One more draft."""
        if self.policy is not PolicyName.OPTIMAL:
            self.score = score
            return
        if self.odds is not None:
            score = self.odds.adjust(score)
        self.draft_scores.append(score)
        self.score *= score


class Stopping:
    """The blocks of a batch under their rules. Blocks without one never end early.

    A further step takes about as long for one block as for all, and all of them wait for it. So blocks whose rules say
    what a step costs them share their steps: see StoppingRule. Any other block is judged alone.
    """

    def __init__(
        self,
        rules: Sequence[StoppingRule | None],
        thresholds: Mapping[PolicyName, float],
        odds: Sequence[TextOdds | None] = (),
    ) -> None:
        """`thresholds` (Scorer) are for rules that leave theirs open; `odds` of the blocks' texts, for optimal ones."""
        self._blocks = [
            None
            if rule is None
            else _Block(
                rule.policy,
                thresholds[rule.policy] if rule.threshold is None else rule.threshold,
                rule.keep_threshold,
                rule.step_cost,
                text_odds,
            )
            for rule, text_odds in zip(rules, odds or [None] * len(rules), strict=True)
        ]
        self._step_cost = sum(block.step_cost for block in self._blocks if block)  # to all that share their steps

    def __bool__(self) -> bool:
        """Whether any block has a rule."""
        return any(self._blocks)

    def judge(
        self, which: Sequence[int], may_go_on: Sequence[bool], scorer: Scorer, logits: Tensor, drafts: Choice
    ) -> list[bool]:
        """Which blocks, by their numbers, get a further draft behind the one that each has just got.

        Those that may not go on, since they are as long as they were asked to be, gain nothing from a further step.
        """
        blocks = [self._blocks[number] for number in which]
        policies = dict.fromkeys(block.policy for block in blocks if block is not None)
        scores = {policy: scorer(policy, logits, drafts) for policy in policies}
        for row, block in enumerate(blocks):
            if block is not None:
                block.add(scores[block.policy][row])
        wished = [
            may and (block is None or block.score >= block.threshold)
            for block, may in zip(blocks, may_go_on, strict=True)
        ]
        pays = self._pays([block for block, wishes in zip(blocks, wished, strict=True) if wishes])
        return [
            wishes and (pays or block is None or not block.step_cost)
            for block, wishes in zip(blocks, wished, strict=True)
        ]

    def is_kept(self, number: int) -> bool:
        """Of a block that ends: whether its last draft is worth verifying."""
        block = self._blocks[number]
        return block is None or block.score >= block.keep_threshold

    def draft_scores(self, number: int) -> Sequence[float]:
        """How likely each draft of a block was held to be right, under optimal stopping; others have none."""
        block = self._blocks[number]
        return () if block is None else block.draft_scores

    def _pays(self, wishing: Sequence[_Block | None]) -> bool:
        """Whether a further step is worth what it costs; one that is made for others in any case costs nothing more."""
        gain = 0.0
        for block in wishing:
            if block is None or not block.step_cost:
                return True
            gain += block.score - block.threshold
        return gain >= self._step_cost
