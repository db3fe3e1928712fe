"""vLLM's structured outputs with drafts. A file of its own: one process holds one engine of vLLM's at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.types import GenerationRequest, SamplingParams
from tests.checkpoints import make_tokenizer
from tests.engines import a_request, generate, make_drafter_engine
from tests.vllm_models import KV_BLOCK, MODEL, build, needs_vllm

pytestmark = needs_vllm


def test_a_grammar_holds_with_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs vLLM's own tokenizer: that of the model's folder."""
    from vllm.sampling_params import StructuredOutputsParams

    links = local_link_factory({"tandem": make_drafter_engine("tandem", model=MODEL)}, synchronous=True)
    engine = build(links, engine_args={"block_size": KV_BLOCK, "skip_tokenizer_init": False})
    original = engine._sampling_params

    def with_grammar(request: GenerationRequest) -> Any:
        params = original(request)
        params.structured_outputs = StructuredOutputsParams(regex="[abc ]{20}[xyz]{30}")
        params.__post_init__()
        return params

    monkeypatch.setattr(engine, "_sampling_params", with_grammar)
    engine.set_drafters(["tandem"])
    sampling = SamplingParams(temperature=0.8, top_p=0.97, seed=11)
    asked = [a_request(f"{i}", range(3, 9 + i), 40, replace(sampling, seed=i)) for i in range(3)]
    without_drafts = [replace(each, request_id=f"p{each.request_id}", block_length=0) for each in asked]
    plain, drafted = generate(engine, without_drafts), generate(engine, asked)
    engine.close()
    assert not any(output.errors for output in (*plain.values(), *drafted.values()))
    expected = [output.token_ids for output in plain.values()]
    assert [output.token_ids for output in drafted.values()] == expected
    assert sum(output.num_accepted_tokens for output in drafted.values()) > 0
    tokenizer = make_tokenizer()
    for token_ids in expected:
        assert re.fullmatch("[abc ]{20}[xyz]+", tokenizer.decode(list(token_ids)))
