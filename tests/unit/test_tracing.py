"""Trace contexts, who is traced, and what an engine tells of a request that is, and of one that is not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tandem_serve.config import TracesConfig
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.errors import ConfigError
from tandem_serve.metrics import WithoutDraft
from tandem_serve.rpc._gen.tandem.v1 import inference_pb2
from tandem_serve.rpc.convert_inference import name_of_call, parse_generate_request, with_metadata
from tandem_serve.serving.tracing import Tracing, start_tracing
from tandem_serve.tracing import Span, TraceContext, spanning
from tandem_serve.types import ExtendSequence
from tests.engines import a_request, drive, generate, make_drafter_engine, make_engine, tiny_drafter
from tests.scripted_engine import started
from tests.scripted_link import ScriptedLink, silence

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"
MALFORMED = ("", "00", SAMPLED.upper(), SAMPLED + "-x", SAMPLED.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32))


def test_a_trace_context_has_the_w3c_s_text_form() -> None:
    context = TraceContext.parse(SAMPLED)
    assert context is not None
    assert str(context) == SAMPLED
    child = context.child()
    assert (child.trace_id, child.span_id != context.span_id) == (context.trace_id, True)
    assert [TraceContext.parse(text) for text in (None, UNSAMPLED, *MALFORMED)] == [None] * (2 + len(MALFORMED))


def test_a_caller_s_decision_stands_and_else_chance_decides() -> None:
    never, always, off = Tracing(sample_ratio=0), Tracing(sample_ratio=1), Tracing()
    assert never.begin(SAMPLED) == TraceContext.parse(SAMPLED)
    assert always.begin(UNSAMPLED) is None
    for absent in (None, *MALFORMED):
        assert never.begin(absent) is None
        fresh = always.begin(absent)
        assert fresh is not None and fresh.span_id == 0
    assert off.begin(SAMPLED) is None


def test_a_span_tells_how_its_block_ended() -> None:
    spans: list[Span] = []
    with spanning(spans.append, "x", None, {}) as context:
        assert context is None
    parent = TraceContext.parse(SAMPLED)
    attributes = {"a": 1}
    with pytest.raises(ValueError, match="boom"), spanning(spans.append, "x", parent, attributes):
        attributes["b"] = 2
        raise ValueError("boom")
    (span,) = spans
    assert (span.parent, dict(span.attributes), span.error) == (parent, {"a": 1, "b": 2}, "ValueError: boom")
    assert span.end_s >= span.start_s


def test_a_traced_request_has_the_same_tokens_and_a_span_a_round() -> None:
    spans: list[Span] = []
    drafter = make_drafter_engine(spans=spans.append)
    engine = make_engine(link_factory=local_link_factory({"d": drafter}, synchronous=True), spans=spans.append)
    engine.set_drafters(["d"])
    request = a_request("r", range(4, 24), 60)
    untraced = generate(engine, [request])["r"]
    assert spans == []
    traced = generate(engine, [replace(request, traceparent=SAMPLED)])["r"]
    assert traced.token_ids == untraced.token_ids
    names = [span.name for span in spans]
    assert (names.count("primary"), names.count("prefill")) == (1, 1)
    root = next(span for span in spans if span.name == "primary")
    assert root.parent == TraceContext.parse(SAMPLED)
    assert root.attributes["num_tokens"] == 60
    rounds = {span.context: span for span in spans if span.name == "round"}
    assert {span.parent for span in rounds.values()} == {root.context}
    assert sum(int(span.attributes["num_tokens"]) for span in rounds.values()) == 59
    drafts = [span for span in spans if span.name == "draft"]
    assert len(drafts) > 5
    for draft in drafts:
        assert rounds[draft.parent].attributes["num_draft_tokens"] == draft.attributes["num_draft_tokens"]


def test_a_round_without_drafts_says_why_and_untraced_rounds_carry_nothing() -> None:
    info = tiny_drafter()[1]
    link = ScriptedLink(info, silence)
    engine, _, clock = started(link)
    drive(engine, clock)
    extends = [command for command in link.commands if isinstance(command, ExtendSequence)]
    assert extends and {command.traceparent for command in extends} == {None}
    spans: list[Span] = []
    engine = make_engine(spans=spans.append)
    generate(engine, [replace(a_request(), traceparent=SAMPLED)])
    causes = [span.attributes["without_draft"] for span in spans if span.name == "round"]
    assert causes == [WithoutDraft.NO_DRAFTER] * len(causes) and causes


def test_grpc_metadata_names_a_request_and_its_trace() -> None:
    plain = parse_generate_request(inference_pb2.GenerateRequest(text="a"))
    metadata = [("x-request-id", "order-66"), ("traceparent", SAMPLED), ("b-bin", b"\0")]
    assert name_of_call(metadata) == "order-66"
    found = with_metadata(plain, "order-66", metadata)
    assert found.request_id.startswith("gen-order-66-")
    assert found == replace(plain, request_id=found.request_id, traceparent=SAMPLED)
    made = {name_of_call(given) for given in ([], [("x-request-id", "a b")], [("x-request-id", b"\0")])}
    assert len(made) == 3 and all(re.fullmatch("[0-9a-f]{32}", name) for name in made)


def test_an_endpoint_must_be_a_url() -> None:
    with pytest.raises(ConfigError, match="collector:4317"):
        start_tracing(TracesConfig(endpoint="collector:4317"), "router", "a")


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    tracing = start_tracing(TracesConfig(endpoint="http://127.0.0.1:9", sample_ratio=1), "router", "a")
    with spanning(tracing.sink, "x", tracing.begin(None), {}):
        pass
    tracing.close()
