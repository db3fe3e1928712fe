"""A primary and a drafter on either side of a socket: the same tokens, whatever becomes of the drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.rpc.drafting_client import GrpcLinkFactory, LinkOptions
from tandem_serve.rpc.drafting_server import DraftingServer
from tandem_serve.types import DecodingMode, GenerationRequest, GenerationStep, SamplingParams
from tests.engines import Output, a_request, generate, make_drafter_engine, make_engine

LINKS = GrpcLinkFactory(LinkOptions(min_backoff_s=0.01, max_backoff_s=0.05))
# Nobody is late for 30 s: acceptance does not depend on how busy the machine is.
PATIENT = PrimaryEngineConfig(draft_timeout_s=30.0)
REQUESTS = [
    a_request(f"r{i}", range(2, 12 + 9 * i), 60, SamplingParams(temperature=0.8 * (i % 2), seed=i)) for i in range(4)
]


@contextmanager
def served_drafter(kind: str, config: DrafterEngineConfig | None = None, port: int = 0) -> Iterator[DraftingServer]:
    config = config or DrafterEngineConfig()
    engine = make_drafter_engine(kind, config)
    engine.start()
    server = DraftingServer(engine, config, port=port)
    server.start()
    yield server
    server.stop(0)
    engine.stop()


@contextmanager
def primary_at(*addresses: str) -> Iterator[TorchPrimary]:
    engine = make_engine(PATIENT, link_factory=LINKS)
    engine.set_drafters(addresses)
    step_until(engine, lambda: drafter_states(engine) == ["ready"] * len(addresses))
    yield engine
    engine.close()


def step_until(engine: TorchPrimary, holds: Callable[[], bool]) -> None:
    """Each step follows from a wake-up; a minute without one is a failure."""
    while not holds():
        if not engine.step() and not holds():
            engine.wait(timeout_s=60)


def drafter_states(engine: TorchPrimary) -> list[str]:
    return [state for _, state in engine.status().drafters]


def plain_tokens(requests: list[GenerationRequest]) -> dict[str, tuple[int, ...]]:
    return {name: output.token_ids for name, output in generate(make_engine(), requests).items()}


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[int, ...]]:
    return plain_tokens(REQUESTS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tandem", {}),
        ("tandem", {"representation_dtype": "f32"}),
        ("tandem", {"representation_dtype": "int8"}),
        ("tandem", {"credit_bytes": 1 << 16}),
        ("last", {}),
        ("plain", {}),
    ],
)
def test_tokens_are_those_of_plain_decoding(
    kind: str, options: dict[str, Any], plain: dict[str, tuple[int, ...]]
) -> None:
    with served_drafter(kind, DrafterEngineConfig(**options)) as server, primary_at(server.address) as engine:
        outputs = generate(engine, REQUESTS)
    assert {name: output.token_ids for name, output in outputs.items()} == plain
    num_drafted = sum(output.num_draft_tokens for output in outputs.values())
    num_accepted = sum(output.num_accepted_tokens for output in outputs.values())
    assert num_drafted > 100
    assert num_accepted > (0.3 * num_drafted if kind != "last" else 0)


@pytest.mark.parametrize("mode", [DecodingMode.TANDEM, DecodingMode.TANDEM_REPRESENTATIONS])
def test_unverified_text_is_that_of_a_drafter_in_process(mode: DecodingMode) -> None:
    requests = [replace(request, mode=mode, block_length=3) for request in REQUESTS]
    here = make_engine(PATIENT, link_factory=local_link_factory({"d": make_drafter_engine("tandem")}, synchronous=True))
    here.set_drafters(["d"])
    expected = {name: output.token_ids for name, output in generate(here, requests).items()}
    exact = DrafterEngineConfig(representation_dtype="f32")
    with served_drafter("tandem", exact) as server, primary_at(server.address) as engine:
        outputs = generate(engine, requests)
    assert {name: output.token_ids for name, output in outputs.items()} == expected != plain_tokens(REQUESTS)


def test_a_drafter_that_dies_and_comes_back_changes_no_token() -> None:
    request = a_request("long", range(2, 30), 240, SamplingParams(temperature=0.8, seed=3))
    (plain,) = plain_tokens([request]).values()
    output = Output()
    drafted_since = 0

    def sink(item: Any) -> None:
        nonlocal drafted_since
        output(item)
        if isinstance(item, GenerationStep):
            drafted_since += item.num_draft_tokens

    with served_drafter("tandem") as first, primary_at(first.address) as engine:
        engine.submit(request, sink)
        step_until(engine, lambda: drafted_since > 20)
        first.stop(0)
        step_until(engine, lambda: drafter_states(engine) == ["connecting"])
        alone_from = len(output.token_ids)
        while len(output.token_ids) < alone_from + 20:  # goes on alone, without waiting for anybody
            assert engine.step()
        drafted_since = 0
        with served_drafter("tandem", port=first.port):
            step_until(engine, lambda: drafter_states(engine) == ["ready"])
            engine.run_until_idle()
    assert output.token_ids == plain
    assert drafted_since > 20  # the running sequence drafts again


def test_a_sequence_moves_to_another_drafter() -> None:
    output = Output()
    with (
        served_drafter("tandem") as second,
        served_drafter("plain") as first,
        primary_at(first.address, second.address) as engine,
    ):
        request = a_request("long", range(2, 30), 200, drafter_address=first.address)
        engine.submit(request, output)
        step_until(engine, lambda: output.num_draft_tokens > 20)
        first.stop(0)
        before = output.num_draft_tokens
        engine.run_until_idle()
    assert (output.token_ids,) == tuple(plain_tokens([request]).values())
    assert output.num_draft_tokens > before + 20
