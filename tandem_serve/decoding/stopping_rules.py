"""When a block of drafts ends: the drafter's side of block_policy.py, as tensor functions over a whole batch.

Shape letters: B blocks being drafted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> Tensor:
        """Scores [B], 0 to 1, of drafts [B] that were chosen by logits [B, V]."""
        ...


# Where nobody has measured better ones.
DEFAULT_THRESHOLDS: Mapping[PolicyName, float] = {
    PolicyName.ENTROPY: 0.1,
    PolicyName.ROUTER: 0.4,
    PolicyName.OPTIMAL: 0.3,
}
ENTROPY_SCALE = 0.2


def entropy_score(logits: Tensor) -> Tensor:
    """A bound on acceptance from the drafter's entropy H in nats: 1 - sqrt(0.2 H), [B] (after AdaEDL)."""
    entropy: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
    return (1 - (ENTROPY_SCALE * entropy).sqrt()).clamp_(0, 1)


def own_logprobs(drafts: Choice) -> Tensor:
    """How clearly MS prefers its drafts: log-softmax, at them, of the scores they were chosen by; [B] float32.

    Greedy, that is MS's own log-probability. Sampled, the scores hold the noise that the primary will add as well: a
    draft that wins by chance alone is close to the next one, where the primary's logits may decide otherwise.
    """
    logprobs: Tensor = drafts.scores.float().log_softmax(-1).gather(-1, drafts.token_ids.unsqueeze(-1))[:, 0]
    return logprobs


def own_odds(drafts: Choice) -> Tensor:
    """The cube root of own_logprobs' probability, [B]: a fair guess of acceptance without training.

    For the demo pair 0.05, 0.3 and 0.5 are accepted in 47, 80 and 89 % of cases. Ranks drafts better than entropy does.
    """
    return (own_logprobs(drafts) / 3).exp_()


class UntrainedScorer:
    """The Scorer of a drafter that has no acceptance model: entropy, and its own odds for optimal stopping."""

    thresholds = DEFAULT_THRESHOLDS

    def __call__(self, policy: PolicyName, logits: Tensor, drafts: Choice) -> Tensor:
        """See Scorer."""
        return own_odds(drafts) if policy is PolicyName.OPTIMAL else entropy_score(logits)


UNTRAINED = UntrainedScorer()


@dataclass(frozen=True, slots=True)
class StoppingRows:
    """The rules of the blocks in a batch, as tensors. Blocks without one never end early.

    Where thresholds are costs, which a keep_threshold above 0 says, their blocks are decided together: a further step
    takes as long for one block as for all, and all of them wait for it. It is made while what those that go on may gain
    pays what it costs everyone. Any other block goes on while its own score reaches its threshold.
    """

    policies: tuple[PolicyName, ...]  # those in use
    which: Tensor  # [B] int64, into `policies`
    compounds: Tensor  # [B] bool: the score is of the whole block, not of its last draft
    shares: Tensor  # [B] bool: decided together with others
    threshold: Tensor  # [B]
    keep_threshold: Tensor  # [B]: what verifying a draft costs
    step_cost: Tensor | None  # []: of a further step, to all blocks that share it; None: no two do

    @classmethod
    def of(
        cls, rules: Sequence[StoppingRule | None], thresholds: Mapping[PolicyName, float], device: torch.device
    ) -> StoppingRows | None:
        """None where no block has a rule; `thresholds` (Scorer) are for rules that leave theirs open."""
        policies = tuple(dict.fromkeys(rule.policy for rule in rules if rule is not None))
        if not policies:
            return None
        numbers = [
            (0, 0.0, 0.0)
            if rule is None
            else (
                policies.index(rule.policy),
                thresholds[rule.policy] if rule.threshold is None else rule.threshold,
                rule.keep_threshold,
            )
            for rule in rules
        ]
        which, threshold, keep = torch.tensor(numbers, dtype=torch.float64).to(device).unbind(1)
        compounds = torch.tensor([rule is not None and rule.policy is PolicyName.OPTIMAL for rule in rules]).to(device)
        sharing = [r is not None and r.policy is PolicyName.OPTIMAL and r.keep_threshold > 0 for r in rules]
        shares = torch.tensor(sharing).to(device)
        step_cost = ((threshold - keep) * shares).sum().float() if sum(sharing) > 1 else None
        return cls(policies, which.long(), compounds, shares, threshold.float(), keep.float(), step_cost)

    def select(self, rows: Tensor) -> StoppingRows:
        """Those of some rows [n] alone."""
        return replace(
            self,
            which=self.which[rows],
            compounds=self.compounds[rows],
            shares=self.shares[rows],
            threshold=self.threshold[rows],
            keep_threshold=self.keep_threshold[rows],
        )

    def survival(self, before: Tensor, scorer: Scorer, logits: Tensor, drafts: Choice) -> Tensor:
        """The blocks' scores [B] with one draft more each, chosen by logits [B, V]; at first 1."""
        by_policy = [scorer(policy, logits, drafts) for policy in self.policies]
        if self.policies == (PolicyName.OPTIMAL,):  # any row without a rule has thresholds of 0
            return before * by_policy[0]
        scores = by_policy[0] if len(by_policy) == 1 else torch.stack(by_policy).gather(0, self.which[None])[0]
        return torch.where(self.compounds, before * scores, scores)

    def goes_on(self, survival: Tensor) -> Tensor:
        """Which blocks [B] get another draft."""
        alone = survival >= self.threshold
        if self.step_cost is None:
            return alone
        gains = (survival - self.keep_threshold) * self.shares
        is_worth_it = gains.clamp(min=0).sum() >= self.step_cost
        return torch.where(self.shares, is_worth_it & (gains >= 0), alone)

    def is_kept(self, survival: Tensor) -> Tensor:
        """Of blocks [B] that end: whether their last draft is worth verifying."""
        return survival >= self.keep_threshold
