"""Block policies: the fixed one honours requests within its cap."""

from __future__ import annotations

import pytest

from tandem_serve.decoding.block_policy import BlockPolicy, FixedBlockLength


@pytest.mark.parametrize(("requested", "expected"), [(None, 5), (0, 0), (3, 3), (8, 8), (9, 8), (-1, 0)])
def test_fixed_block_length(requested: int | None, expected: int) -> None:
    policy: BlockPolicy = FixedBlockLength(default=5, maximum=8)
    assert policy.block_length(requested, num_requests_running=1) == expected
    assert policy.block_length(requested, num_requests_running=64) == expected


def test_default_beyond_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="not within"):
        FixedBlockLength(default=9, maximum=8)
