"""What must arrive at a collector of one traced request, however the three pools run."""

from __future__ import annotations

import httpx

from tests.otlp_collector import Collector
from tests.serving_contract import PROMPT, Cluster, eventually

TRACE_ID, LATER_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def check_one_request_is_one_trace(cluster: Cluster, collector: Collector) -> None:
    """The cluster exports to `collector` and traces nothing by chance; the caller's own trace is continued."""

    def complete_traced(trace_id: str) -> None:
        headers = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
        response = httpx.post(f"{cluster.http}/v1/completions", json=body, headers=headers, timeout=60)
        assert response.json()["choices"][0]["text"] == cluster.text(max_tokens=48)
        eventually(lambda: has_arrived(trace_id), "all three pools have exported their spans")

    def has_arrived(trace_id: str) -> bool:
        found = collector.trace(trace_id)
        drafted = {span.span_id for span in found if span.attributes.get("num_draft_tokens") and span.name == "round"}
        names = {span.name for span in found}
        return {"completion", "primary"} <= names and drafted <= {s.parent_id for s in found if s.name == "draft"}

    body = {"model": cluster.model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    complete_traced(TRACE_ID)
    spans = collector.trace(TRACE_ID)
    by_id = {span.span_id: span for span in spans}
    parents = {(s.service, s.name, getattr(by_id.get(s.parent_id), "name", s.parent_id)) for s in spans}
    assert parents == {
        ("tandem-router", "completion", CALLER),
        ("tandem-router", "sequence", "completion"),
        ("tandem-primary", "primary", "sequence"),
        ("tandem-primary", "prefill", "primary"),
        ("tandem-primary", "round", "primary"),
        ("tandem-drafter", "draft", "round"),
    }
    rounds = [span for span in spans if span.name == "round"]
    assert sum(span.attributes["num_tokens"] for span in rounds) == 48 - 1  # the first is the prefill's
    assert any(span.attributes["num_draft_tokens"] for span in rounds)
    ends = [rounds[0].start_ns, *(span.end_ns for span in rounds)]
    assert ends == sorted(ends)
    cluster.complete()  # it brings no trace
    complete_traced(LATER_ID)  # spans leave a process in order: any of the request before would be here by now
    assert collector.num_spans() == len(collector.trace(TRACE_ID)) + len(collector.trace(LATER_ID))
