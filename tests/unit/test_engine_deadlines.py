"""A request whose time is up leaves the engine, whether it waits or runs; the others do not notice."""

from __future__ import annotations

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.errors import DeadlineExceeded
from tests.engines import Output, a_request, generate, make_engine
from tests.scripted_link import Clock


def test_the_late_are_ended_and_the_others_finish() -> None:
    clock = Clock()
    engine = make_engine(PrimaryEngineConfig(max_num_seqs=2), clock=clock)
    requests = [a_request("on time"), a_request("running", timeout_s=2.0), a_request("waiting", timeout_s=1.0)]
    outputs = {request.request_id: Output() for request in requests}
    for request in requests:
        engine.submit(request, outputs[request.request_id])
    for _ in range(4):
        engine.step()
    clock.now_s += 1.0
    engine.step()
    assert [type(error) for error in outputs["waiting"].errors] == [DeadlineExceeded]
    assert outputs["waiting"].steps == []
    assert outputs["running"].errors == []
    clock.now_s += 1.0
    engine.run_until_idle()
    assert [type(error) for error in outputs["running"].errors] == [DeadlineExceeded]
    expected = generate(make_engine(), [a_request("on time")])["on time"].token_ids
    assert outputs["on time"].token_ids == expected
    assert outputs["running"].token_ids == expected[: len(outputs["running"].token_ids)]
    assert 0 < len(outputs["running"].token_ids) < len(expected)
    assert engine.status().kv_cache_usage == 0.0
