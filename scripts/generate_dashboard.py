"""Generates observability/dashboard.json, Grafana's view of a cluster: `generate_dashboard.py [--check]`.

A panel is a title, a unit and its queries; all that Grafana wants around them is the same everywhere. `--check` writes
nothing and fails where the committed file differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).resolve().parents[1] / "observability" / "dashboard.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3


class Panel(NamedTuple):
    """One graph. Queries by legend; [] in a query stands for the interval."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""


def _rate(series: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({series}[]))"


def _quantiles(histogram: str, of: tuple[float, ...] = (0.5, 0.95, 0.99)) -> dict[str, str]:
    return {f"p{100 * q:g}": f"histogram_quantile({q}, {_rate(f'{histogram}_bucket', 'le')})" for q in of}


_ACCEPTED, _DRAFTED = "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
_DRAFTS, _AT = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total"

ROWS: dict[str, list[Panel]] = {
    "What clients see": [
        Panel(
            "Completions", "reqps", {"{{finished_reason}}": _rate("tandem:router_completions_total", "finished_reason")}
        ),
        Panel("Requests that failed", "reqps", {"{{kind}}": _rate("tandem:router_errors_total", "kind")}),
        Panel("Tokens", "suffix:tokens/s", {"tokens/s": _rate("tandem:router_generation_tokens_total")}),
        Panel("Time to first token", "s", _quantiles("tandem:router_time_to_first_token_seconds")),
        Panel("Between steps of a text", "s", _quantiles("tandem:router_inter_token_latency_seconds")),
        Panel("Whole request", "s", _quantiles("tandem:router_e2e_request_latency_seconds")),
    ],
    "Speculation": [
        Panel(
            "Accepted of drafted",
            "percentunit",
            {"draft acceptance rate": f"{_rate(_ACCEPTED)} / {_rate(_DRAFTED)}"},
            "vLLM's draft_acceptance_rate.",
        ),
        Panel(
            "Tokens a drafted round",
            "suffix:tokens",
            {"mean acceptance length": f"1 + {_rate(_ACCEPTED)} / {_rate(_DRAFTS)}"},
            "vLLM's mean_acceptance_length: what one verification brings.",
        ),
        Panel(
            "Accepted by place in the block",
            "percentunit",
            {"{{position}}": f"{_rate(_AT, 'position')} / ignoring (position) group_left () {_rate(_DRAFTS)}"},
        ),
        Panel(
            "Rounds without drafts",
            "suffix:rounds/s",
            {"{{cause}}": _rate("tandem:rounds_without_draft_total", "cause")},
            "Each such round brings one token. docs/operations.md says what the causes mean.",
        ),
        Panel("Wait for a block", "s", _quantiles("tandem:draft_wait_seconds")),
        Panel(
            "Where that wait goes (median)",
            "s",
            {
                "drafter": _quantiles("tandem:draft_seconds", of=(0.5,))["p50"],
                "wire and queues": _quantiles("tandem:draft_round_trip_seconds", of=(0.5,))["p50"],
            },
        ),
    ],
    "Primary pool": [
        Panel(
            "Requests",
            "short",
            {
                "{{instance}} running": "vllm:num_requests_running",
                "{{instance}} waiting": "vllm:num_requests_waiting",
            },
        ),
        Panel("KV cache", "percentunit", {"{{instance}}": "vllm:kv_cache_usage_perc"}),
        Panel("Wait for admission", "s", _quantiles("vllm:request_queue_time_seconds")),
        Panel(
            "What the engine's thread does",
            "percentunit",
            {
                "{{instance}} works": _rate("tandem:engine_busy_seconds_total", "instance"),
                "{{instance}} waits for drafts": _rate("tandem:primary_draft_idle_seconds_total", "instance"),
            },
            "What is missing to 100 % is time without requests.",
        ),
        Panel(
            "A step",
            "s",
            {
                **{f"all {name}": query for name, query in _quantiles("tandem:step_seconds").items()},
                "with drafts p50": _quantiles("tandem:verify_step_seconds")["p50"],
            },
        ),
        Panel("Time a token, by request", "s", _quantiles("vllm:request_time_per_output_token_seconds")),
        Panel(
            "Prompt and generated tokens",
            "suffix:tokens/s",
            {"prompt": _rate("vllm:prompt_tokens_total"), "generated": _rate("vllm:generation_tokens_total")},
        ),
        Panel(
            "Representations",
            "Bps",
            {"sent by {{instance}}": _rate("tandem:representation_bytes_total", "instance")},
        ),
        Panel("Representations kept", "bytes", {"{{instance}}": "tandem:representation_log_bytes"}),
    ],
    "Drafter pool": [
        Panel("Sequences", "short", {"{{instance}}": "tandem:drafter_num_sequences"}),
        Panel("KV cache", "percentunit", {"{{instance}}": "tandem:drafter_kv_cache_usage_perc"}),
        Panel(
            "What the engine's thread does",
            "percentunit",
            {
                "{{instance}} works": _rate("tandem:drafter_busy_seconds_total", "instance"),
                "{{instance}} waits for primaries": _rate("tandem:drafter_starved_seconds_total", "instance"),
            },
            "What is missing to 100 % is time without sequences.",
        ),
        Panel("A step", "s", _quantiles("tandem:drafter_step_seconds")),
        Panel(
            "Drafts and verified positions",
            "suffix:tokens/s",
            {
                "drafted": _rate("tandem:drafter_draft_tokens_total"),
                "taken in": _rate("tandem:drafter_verified_positions_total"),
            },
        ),
        Panel(
            "Sequences turned away",
            "suffix:/s",
            {"retryable: {{retryable}}": _rate("tandem:drafter_rejections_total", "retryable")},
        ),
    ],
    "Health": [
        Panel(
            "Links to drafters",
            "short",
            {"{{instance}} ready": "tandem:drafters_ready", "known": "tandem:drafters_known"},
        ),
        Panel(
            "Replicas that routers know",
            "short",
            {"{{instance}} {{of}}s": "tandem:router_members"},
        ),
        Panel(
            "Sequences by replica",
            "short",
            {"{{of}} {{member}}": "sum by (of, member) (tandem:router_num_sequences)"},
            "As the routers have paired them.",
        ),
        Panel(
            "What should not happen",
            "suffix:/s",
            {
                "failovers": _rate("tandem:router_failovers_total"),
                "failed steps": _rate("tandem:failed_steps_total"),
                "near ties settled": _rate("tandem:near_ties_total"),
            },
            "Near ties are harmless: choices that were made again so that all ways of decoding agree.",
        ),
        Panel("Memory", "bytes", {"{{instance}}": "process_resident_memory_bytes"}),
        Panel("Cores in use", "short", {"{{instance}}": _rate("process_cpu_seconds_total", "instance")}),
    ],
}


def dashboard() -> dict[str, Any]:
    """Grafana's model of it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, y, 24, 1)})
        y += 1
        for index, panel in enumerate(row):
            x = index % COLUMNS * WIDTH
            panels.append(_graph(panel, _at(x, y + index // COLUMNS * HEIGHT, WIDTH, HEIGHT)))
        y += -(-len(row) // COLUMNS) * HEIGHT
    variable = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "tandem-serve",
        "title": "tandem-serve",
        "tags": ["tandem-serve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def _graph(panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": SOURCE,
            "expr": expr.replace("[]", "[$__rate_interval]"),
            "legendFormat": legend,
        }
        for i, (legend, expr) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def main() -> int:
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv:
        is_current = FILE.read_text() == text
        print("the dashboard is current" if is_current else f"{FILE} differs: run this script without --check")
        return int(not is_current)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
