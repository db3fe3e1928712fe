"""Block policies: what a round asks for."""

from __future__ import annotations

import pytest

from tandem_serve.decoding.block_policy import BlockPlan, BlockPolicy
from tandem_serve.decoding.requested_policy import RequestedPolicy
from tandem_serve.types import PolicyName, StoppingRule
from tests.engines import a_request


@pytest.mark.parametrize(("requested", "expected"), [(None, 5), (0, 0), (3, 3), (8, 8), (9, 8), (-1, 0)])
def test_fixed_block_length(requested: int | None, expected: int) -> None:
    policy: BlockPolicy = RequestedPolicy(default=5, maximum=8)
    request = a_request(block_length=requested)
    assert policy.plan(request, num_requests_running=1) == BlockPlan(expected)
    assert policy.plan(request, num_requests_running=64) == BlockPlan(expected)


def test_a_request_chooses_its_policy_and_the_engine_has_a_default() -> None:
    policy = RequestedPolicy(default=5, policy=PolicyName.ENTROPY, maximum=64, longest=12)
    entropy = StoppingRule(PolicyName.ENTROPY)
    assert policy.plan(a_request(), 1) == BlockPlan(12, entropy)
    assert policy.plan(a_request(block_length=4), 1) == BlockPlan(4, entropy)
    assert policy.plan(a_request(block_length=0), 1) == BlockPlan(0)
    assert policy.plan(a_request(policy=PolicyName.FIXED), 1) == BlockPlan(5)
    asked = a_request(policy=PolicyName.ROUTER, threshold=0.25)
    assert policy.plan(asked, 1) == BlockPlan(12, StoppingRule(PolicyName.ROUTER, 0.25))


def test_default_beyond_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="not within"):
        RequestedPolicy(default=9, maximum=8)
