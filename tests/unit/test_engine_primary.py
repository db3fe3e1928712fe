"""The primary engine without drafters: the right tokens however it batches, and its queue and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.engine.canonical import canonical_logits
from tandem_serve.errors import InvalidRequest, Overloaded, TandemError, Unavailable
from tandem_serve.types import FinishReason, GenerationStep, SamplingParams
from tests.checkpoints import VOCAB_SIZE
from tests.engines import FAMILIES, GREEDY, Output, a_request, generate, make_engine, reference_tokens, tiny_primary

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_whole_passes(family: str, sampling: SamplingParams) -> None:
    decoder, _, _ = tiny_primary(FAMILIES[family])
    requests = [a_request(f"r{i}", range(3 + i, 3 + 8 * i + 1), 10, replace(sampling, seed=i)) for i in range(1, 5)]
    engine = make_engine(PrimaryEngineConfig(max_num_batched_tokens=16), model=FAMILIES[family])
    outputs = generate(engine, requests)
    for request in requests:
        assert outputs[request.request_id].token_ids == reference_tokens(decoder, request)
        assert outputs[request.request_id].finish_reason is FinishReason.LENGTH


@settings(max_examples=25)
@given(data=st.data())
def test_batch_and_chunks_change_no_token(data: st.DataObject) -> None:
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40), min_size=1, max_size=4)
    )
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    requests = [a_request(f"r{i}", prompt, 6, replace(SAMPLED, seed=seed)) for i, prompt in enumerate(prompts)]
    config = PrimaryEngineConfig(
        max_num_batched_tokens=data.draw(st.integers(16, 64)),
        max_num_seqs=data.draw(st.integers(1, 4)),
        kv_cache_tokens=data.draw(st.integers(64, 256)),
        kv_block_size=data.draw(st.sampled_from([1, 7, 16])),
    )
    outputs = generate(make_engine(config), requests)
    alone = make_engine()
    for request in requests:
        assert outputs[request.request_id].token_ids == generate(alone, [request])[request.request_id].token_ids


def test_restart_with_delivered_tokens_continues_the_same_text() -> None:
    request = a_request(max_tokens=20, sampling=SAMPLED)
    whole = generate(make_engine(), [request])["r"].token_ids
    for cut in (1, 7, 19):
        rest = a_request("r", request.prompt_token_ids + whole[:cut], 20 - cut, SAMPLED)
        assert whole[:cut] + generate(make_engine(), [rest])["r"].token_ids == whole


def test_stop_ids_end_the_text_and_are_included() -> None:
    whole = generate(make_engine(), [a_request(max_tokens=20)])["r"].token_ids
    stop = whole[5]
    output = generate(make_engine(), [a_request(max_tokens=20, stop_token_ids=(stop,))])["r"]
    assert output.token_ids == whole[: whole.index(stop) + 1]
    assert output.finish_reason is FinishReason.STOP


def test_near_ties_are_decided_by_the_tokens_alone() -> None:
    """With every choice called a near tie, each token comes from the canonical pass, and they agree."""
    request = a_request(sampling=SAMPLED)
    engine = make_engine(tie_margin=1e9)
    assert generate(engine, [request])["r"].token_ids == reference_tokens(tiny_primary()[0], request)
    assert engine.metrics.registry.get_sample_value("tandem:near_ties_total") == request.max_tokens


def test_logprobs_are_the_clean_softmax() -> None:
    decoder, _, _ = tiny_primary()
    request = a_request(max_tokens=5, sampling=SAMPLED, num_logprobs=3)
    output = generate(make_engine(), [request])["r"]
    assert len(output.logprobs) == 5
    tokens = list(request.prompt_token_ids)
    for entry in output.logprobs:
        with torch.inference_mode():
            expected = canonical_logits(decoder, tokens)[0].log_softmax(-1)
        best = expected.topk(3)
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        tokens.append(entry.token_id)
    assert output.token_ids == tuple(tokens[3:])


def test_zero_logprobs_gives_the_chosen_one_alone() -> None:
    output = generate(make_engine(), [a_request(max_tokens=2, num_logprobs=0)])["r"]
    assert [entry.top for entry in output.logprobs] == [(), ()]
    assert generate(make_engine(), [a_request(max_tokens=2)])["r"].logprobs == ()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ()}, "prompt_token_ids"),
        ({"prompt": (1, VOCAB_SIZE)}, "prompt_token_ids"),
        ({"prompt": (-1,)}, "prompt_token_ids"),
        ({"prompt": (1,) * 600}, "prompt_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 510}, "max_tokens"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "é" * 65}, "request_id"),
        ({"num_logprobs": -1}, "num_logprobs"),
        ({"block_length": 65}, "block_length"),
        ({"sampling": SamplingParams(temperature=-0.1)}, "temperature"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "temperature"),
        ({"sampling": SamplingParams(top_p=0.0)}, "top_p"),
        ({"sampling": SamplingParams(top_k=-1)}, "top_k"),
        ({"sampling": SamplingParams(min_p=1.0)}, "min_p"),
        ({"sampling": SamplingParams(seed=1 << 63)}, "seed"),
    ],
)
def test_impossible_requests_are_refused_by_field(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_engine().submit(a_request(**fields), Output())  # type: ignore[arg-type]
    assert caught.value.field == named


def test_a_request_larger_than_the_whole_cache_is_refused() -> None:
    engine = make_engine(PrimaryEngineConfig(kv_cache_tokens=64))
    with pytest.raises(InvalidRequest, match="KV cache"):
        engine.submit(a_request(max_tokens=62), Output())
    assert len(generate(engine, [a_request(max_tokens=61)])["r"].token_ids) == 61


def test_requests_queue_for_memory_and_all_finish() -> None:
    """Each needs half the cache: never more than two run, none is lost, and the memory comes back."""
    engine = make_engine(PrimaryEngineConfig(kv_cache_tokens=64, max_num_seqs=8))
    outputs = {f"r{i}": Output() for i in range(6)}
    for name, output in outputs.items():
        engine.submit(a_request(name, max_tokens=29), output)
    most_running = 0
    while engine.has_work:
        assert engine.step()
        status = engine.status()
        most_running = max(most_running, status.num_requests_running)
        assert status.kv_cache_usage <= 1.0
    assert most_running == 2
    assert {len(output.token_ids) for output in outputs.values()} == {29}
    assert engine.status().kv_cache_usage == 0.0


def test_queue_is_bounded_and_ids_are_unique() -> None:
    engine = make_engine(PrimaryEngineConfig(max_num_seqs=1, max_num_waiting=1))
    engine.submit(a_request("a"), Output())
    with pytest.raises(InvalidRequest, match="already running"):
        engine.submit(a_request("a"), Output())
    engine.submit(a_request("b"), Output())
    with pytest.raises(Overloaded):
        engine.submit(a_request("c"), Output())
    engine.run_until_idle()
    assert len(generate(engine, [a_request("a")])["a"].token_ids) == 12


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_abort_ends_waiting_and_running_requests(num_steps: int) -> None:
    engine = make_engine(PrimaryEngineConfig(max_num_seqs=1))
    outputs = {name: Output() for name in "ab"}
    for name, output in outputs.items():
        engine.submit(a_request(name), output)
    for _ in range(num_steps):
        engine.step()
    engine.abort("a")
    engine.abort("unknown")
    engine.run_until_idle()
    assert outputs["a"].finish_reason is FinishReason.ABORT
    assert len(outputs["a"].token_ids) == num_steps
    assert outputs["b"].token_ids == reference_tokens(tiny_primary()[0], a_request())
    assert engine.status().kv_cache_usage == 0.0


def test_a_failing_step_fails_its_requests_and_the_engine_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _, _ = tiny_primary()
    engine, output = make_engine(), Output()
    engine.submit(a_request(), output)
    engine.step()

    def fail(*_: object) -> None:
        raise RuntimeError("a kernel gave up")

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "logits", fail)
        engine.step()
    assert isinstance(output.errors[0], Unavailable)
    assert not engine.has_work
    assert engine.status().kv_cache_usage == 0.0
    assert generate(engine, [a_request("next")])["next"].token_ids == reference_tokens(decoder, a_request())


def test_a_sink_that_raises_costs_its_own_request_alone() -> None:
    engine, output = make_engine(), Output()

    def broken(_: GenerationStep | TandemError) -> None:
        raise RuntimeError("the reader has gone")

    engine.submit(a_request("broken"), broken)
    engine.submit(a_request("whole"), output)
    engine.run_until_idle()
    assert output.token_ids == reference_tokens(tiny_primary()[0], a_request())
    assert engine.status().kv_cache_usage == 0.0


def test_prompts_are_not_starved_by_decoding_sequences() -> None:
    """Twelve decoding sequences would fill a step of 16 tokens but for the quarter that prompts may claim."""
    engine = make_engine(PrimaryEngineConfig(max_num_batched_tokens=16, max_num_seqs=32))
    for i in range(20):
        engine.submit(a_request(f"short{i}", max_tokens=200), Output())
    for _ in range(20):
        engine.step()
    late = Output()
    engine.submit(a_request("late", [3] * 24, max_tokens=4), late)
    for _ in range(7):
        engine.step()
    assert late.token_ids


def test_metrics_use_vllm_names() -> None:
    engine = make_engine()
    generate(engine, [a_request()])
    value = engine.metrics.registry.get_sample_value
    assert value("vllm:generation_tokens_total") == 12
    assert value("vllm:prompt_tokens_total") == 3
    assert value("vllm:request_success_total", {"finished_reason": "length"}) == 1
    assert value("vllm:time_to_first_token_seconds_count") == 1
    assert value("vllm:request_queue_time_seconds_count") == 1
    assert value("vllm:inter_token_latency_seconds_count") == 11
    assert value("vllm:e2e_request_latency_seconds_count") == 1
    assert value("vllm:request_time_per_output_token_seconds_count") == 1
    assert value("tandem:step_seconds_count") == 12
    assert value("tandem:verify_step_seconds_count") == 0
    assert value("tandem:engine_busy_seconds_total", {}) > 0
    assert value("vllm:num_requests_running") == 0
    assert value("tandem:rounds_without_draft_total", {"cause": "no_drafter"}) == 11
