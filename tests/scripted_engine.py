"""A primary engine among scripted drafters, at a time of the test's own."""

from __future__ import annotations

from functools import cache

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.types import PrimaryInfo
from tests.engines import Output, a_request, generate, make_engine
from tests.scripted_link import Clock, ScriptedLink

REQUEST = a_request("r", range(4, 24), 120)


@cache
def whole_text() -> tuple[int, ...]:
    """REQUEST's prompt and its plain continuation."""
    return REQUEST.prompt_token_ids + generate(make_engine(), [REQUEST])["r"].token_ids


def started(
    links: ScriptedLink | dict[str, ScriptedLink], config: PrimaryEngineConfig | None = None
) -> tuple[TorchPrimary, Output, Clock]:
    """An engine that knows these drafters, with REQUEST submitted."""
    links = {"a": links} if isinstance(links, ScriptedLink) else links
    clock, output = Clock(), Output()

    def connect(address: str, primary: PrimaryInfo, wake: object) -> ScriptedLink:
        return links[address](address, primary, wake)  # type: ignore[arg-type]

    engine = make_engine(config, link_factory=connect, clock=clock)
    engine.set_drafters(links)
    engine.submit(REQUEST, output)
    return engine, output, clock


def causes(engine: TorchPrimary) -> dict[str, int]:
    """Rounds without drafts, by cause."""
    samples = [
        s for m in engine.metrics.registry.collect() for s in m.samples if s.name.endswith("without_draft_total")
    ]
    return {s.labels["cause"]: int(s.value) for s in samples if s.value}
