"""Plain decoding against a plain drafter and a tandem drafter, batch 1, interleaved prompt by prompt in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem_serve.bench.summary import PromptRun, ratio_spread, ratios, summarize
from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.errors import Unavailable
from tandem_serve.interfaces import DrafterLink, LinkFactory, LinkState
from tandem_serve.models.decoder import Decoder
from tandem_serve.types import (
    DecodingMode,
    DraftBlock,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    SamplingParams,
)

CONNECT_TIMEOUT_S = 60.0


class _TimedLink:
    """A DrafterLink that also notes how long the drafter worked on each block."""

    def __init__(self, inner: DrafterLink, draft_s: list[float]) -> None:
        self._inner = inner
        self._draft_s = draft_s

    @property
    def address(self) -> str:
        return self._inner.address

    @property
    def state(self) -> LinkState:
        return self._inner.state

    @property
    def epoch(self) -> int:
        return self._inner.epoch

    @property
    def info(self) -> DrafterInfo | None:
        return self._inner.info

    def credit_bytes(self) -> int:
        return self._inner.credit_bytes()

    def send(self, commands: Sequence[DrafterCommand]) -> None:
        self._inner.send(commands)

    def receive(self) -> list[DraftEvent]:
        events = self._inner.receive()
        self._draft_s += [event.draft_time_s for event in events if isinstance(event, DraftBlock)]
        return events

    def close(self) -> None:
        self._inner.close()


class Mode:
    """One way to decode: an engine of its own on the shared weights of the primary."""

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        info: PrimaryInfo,
        config: PrimaryEngineConfig,
        factory: LinkFactory | None,  # None: plain
        address: str = "",
    ) -> None:
        self.name = name
        self._draft_s: list[float] = []

        def timed(address: str, primary: PrimaryInfo, wake: Callable[[], None]) -> DrafterLink:
            assert factory is not None
            return _TimedLink(factory(address, primary, wake), self._draft_s)

        self._engine = TorchPrimary(decoder, info, config, link_factory=timed if factory else None)
        self.decoding = DecodingMode.SPECULATIVE
        self.block_length = None if factory else 0
        if factory:
            self._engine.set_drafters([address])
            self._connect(address)

    def _connect(self, address: str) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while dict(self._engine.status().drafters).get(address) != LinkState.READY.value:
            if time.monotonic() > deadline:
                raise Unavailable(f"mode {self.name}: the drafter at {address} is not ready: {self._engine.status()}")
            if not self._engine.step():
                self._engine.wait(0.05)

    def run(
        self, prompt: tuple[int, ...], max_tokens: int, sampling: SamplingParams, decoder: TimedDecoder
    ) -> PromptRun:
        """Completes one prompt. Greedy or seeded, without stop tokens: every mode decodes the same length."""
        steps: list[GenerationStep | Exception] = []
        times: list[float] = []
        self._draft_s.clear()
        decoder.seconds.clear()

        def sink(step: GenerationStep | Exception) -> None:
            times.append(time.perf_counter())
            steps.append(step)

        request = GenerationRequest(
            "bench", prompt, sampling, max_tokens, block_length=self.block_length, mode=self.decoding
        )
        start = time.perf_counter()
        self._engine.submit(request, sink)
        self._engine.run_until_idle()
        for step in steps:
            if isinstance(step, Exception):
                raise step
        return PromptRun(
            steps=tuple(step for step in steps if isinstance(step, GenerationStep)),
            first_token_s=times[0] - start,
            decode_s=times[-1] - times[0],
            draft_s=tuple(self._draft_s),
            verify_s=tuple(decoder.seconds[-(len(steps) - 1) :] if len(steps) > 1 else ()),
        )

    def close(self) -> None:
        self._engine.close()


class TimedDecoder:
    """Times a decoder's passes, layers and head together, by wrapping its two entry points on this one object."""

    def __init__(self, decoder: Decoder) -> None:
        self.seconds: list[float] = []
        run_layers, logits = decoder.run_layers, decoder.logits

        def timed_layers(*args: Any) -> Any:
            start = time.perf_counter()
            output = run_layers(*args)
            self.seconds.append(time.perf_counter() - start)
            return output

        def timed_logits(*args: Any) -> Any:
            start = time.perf_counter()
            output = logits(*args)
            self.seconds[-1] += time.perf_counter() - start
            return output

        vars(decoder).update(run_layers=timed_layers, logits=timed_logits)


@dataclass(frozen=True)
class DecodePlan:
    """What to measure."""

    prompts: Sequence[tuple[int, ...]]
    max_tokens: int
    temperature: float
    num_warmup: int = 2


def measure_decode(
    modes: Sequence[Mode], plan: DecodePlan, decoder: TimedDecoder, progress: Callable[[], None]
) -> dict[str, Any]:
    """Runs every prompt in every mode, the order turning by one each time. Returns "modes" and the ratios."""
    runs: dict[str, list[PromptRun]] = {mode.name: [] for mode in modes}
    for turn in range(-plan.num_warmup, len(plan.prompts)):
        prompt = plan.prompts[max(turn, 0)]
        sampling = SamplingParams(temperature=plan.temperature, seed=max(turn, 0))
        for place in range(len(modes)):
            mode = modes[(turn + place) % len(modes)]
            run = mode.run(prompt, plan.max_tokens, sampling, decoder)
            if turn >= 0:
                runs[mode.name].append(run)
                progress()
    plain = runs.get("plain")
    return {
        "modes": {name: summarize(of_mode, plain) for name, of_mode in runs.items()},
        "ratios": ratios(runs),
        "ratio_spread": ratio_spread(runs),
    }
