"""The three pools as plain processes with vLLM as the primary's engine: clients cannot tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.test_plain_processes import Pools
from tests.serving_contract import LONG, Cluster, ServingContract
from tests.vllm_models import MODEL, needs_vllm

pytestmark = needs_vllm

# So tiny a primary is as cheap as its drafter: measured, drafts are not worth much.
OPTIONS = ("--engine", "vllm", "--taps", "0,1,2", "--no-adapts")


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(tmp_path_factory.mktemp("vllm-pools"), MODEL, OPTIONS)
    yield pools
    pools.stop()
    statuses = pools.exit_statuses()
    assert (statuses["primary"], statuses["router"]) == (0, 0)  # the drafter was killed


@pytest.fixture(scope="module")
def cluster(pools: Pools) -> Cluster:
    return pools.cluster


class TestVllmProcesses(ServingContract):
    def test_a_drafter_may_die_in_mid_stream(self, pools: Pools, cluster: Cluster) -> None:
        """The last test: no token changes, and the sequence goes on without."""
        body = {"temperature": 0.9, "seed": 3, "max_tokens": LONG // 6, "ignore_eos": True}
        plain = cluster.text(block_length=0, **body)
        choices = cluster.choices_while({5: pools.kill_drafter}, **body)
        assert "".join(choice["text"] for choice in choices) == plain
        assert sum(choice["num_accepted_tokens"] for choice in choices[:5]) > 0
        assert sum(choice["num_accepted_tokens"] for choice in choices[-20:]) == 0
