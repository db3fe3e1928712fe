"""Building blocks for tests of the engines: loaded tiny models, a reference generator, and collected outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.decoding.block_policy import StepSize
from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.canonical import canonical_logits
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.errors import TandemError
from tandem_serve.models.checkpoint import drafter_info, load_decoder, load_drafter, primary_info
from tandem_serve.models.decoder import Decoder, DecoderConfig
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.types import (
    DrafterInfo,
    FinishReason,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    SamplingParams,
    TokenLogprob,
)
from tests.checkpoints import CONFIG, make_drafter, make_plain_drafter, make_primary
from tests.scripted_link import Clock

GREEDY = SamplingParams(temperature=0.0)


FAMILIES: dict[str, DecoderConfig] = {
    "llama": CONFIG,
    "mistral, window 5": replace(CONFIG, model_type="mistral", sliding_windows=(5,) * 3),
    "qwen2": replace(CONFIG, model_type="qwen2", attention_bias=True),
    "qwen3, one layer of three sliding": replace(
        CONFIG, model_type="qwen3", qk_norm=True, sliding_windows=(None, None, 4)
    ),
}

_folder = TemporaryDirectory(prefix="tandem-test-")  # removed at exit
_primaries: dict[str, tuple[Decoder, PrimaryInfo, Path]] = {}


def tiny_primary(config: DecoderConfig = CONFIG) -> tuple[Decoder, PrimaryInfo, Path]:
    """Decoder, info and folder of the tiny primary of a configuration, made once a session. Leave it unchanged."""
    if repr(config) not in _primaries:
        path = make_primary(Path(_folder.name) / f"primary-{len(_primaries)}", config=config)
        _primaries[repr(config)] = (load_decoder(path).pack(), primary_info(path), path)
    return _primaries[repr(config)]


def make_engine(
    config: PrimaryEngineConfig | None = None, *, model: DecoderConfig = CONFIG, **options: object
) -> TorchPrimary:
    """A primary engine on a tiny model. `options` go to TorchPrimary."""
    decoder, info, _ = tiny_primary(model)
    return TorchPrimary(decoder, info, config or PrimaryEngineConfig(), **options)  # type: ignore[arg-type]


def a_request(
    request_id: str = "r",
    prompt: Sequence[int] = (5, 6, 7),
    max_tokens: int = 12,
    sampling: SamplingParams = GREEDY,
    **fields: object,
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), sampling, max_tokens, **fields)  # type: ignore[arg-type]


def step_of(*block_lengths: int) -> StepSize:
    """A step of sequences that decode, each with so many drafts."""
    num_sequences = len(block_lengths)
    return StepSize(max(block_lengths), num_sequences, num_sequences + sum(block_lengths), has_prompts=False)


@torch.inference_mode()
def reference_tokens(decoder: Decoder, request: GenerationRequest) -> tuple[int, ...]:
    """Decoding as it is defined: one whole pass over the sequence for each token. No cache, no batch, no drafts."""
    tokens = list(request.prompt_token_ids)
    while len(tokens) < len(request.prompt_token_ids) + request.max_tokens:
        rows = SamplingRows.from_params([(request.sampling, len(tokens))])
        tokens.append(int(choose_token_ids(canonical_logits(decoder, tokens), rows).token_ids))
        if tokens[-1] in request.stop_token_ids:
            break
    return tuple(tokens[len(request.prompt_token_ids) :])


@dataclass
class Output:
    """A sink that keeps what it is given."""

    steps: list[GenerationStep] = field(default_factory=list)
    errors: list[TandemError] = field(default_factory=list)

    def __call__(self, item: GenerationStep | TandemError) -> None:
        if isinstance(item, GenerationStep):
            self.steps.append(item)
        else:
            self.errors.append(item)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for step in self.steps for token_id in step.token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return tuple(logprob for step in self.steps for logprob in step.logprobs)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.steps[-1].finish_reason if self.steps else None

    @property
    def num_accepted_tokens(self) -> int:
        return sum(step.num_accepted_tokens for step in self.steps)

    @property
    def num_draft_tokens(self) -> int:
        return sum(step.num_draft_tokens for step in self.steps)


def generate(engine: TorchPrimary, requests: Iterable[GenerationRequest]) -> dict[str, Output]:
    """Submits all requests at once and steps the engine until they are done."""
    outputs = {}
    for request in requests:
        outputs[request.request_id] = Output()
        engine.submit(request, outputs[request.request_id])
    engine.run_until_idle()
    return outputs


_drafters: dict[str, tuple[TandemDrafter | Decoder, DrafterInfo]] = {}


def tiny_drafter(kind: str = "tandem", config: DecoderConfig = CONFIG) -> tuple[TandemDrafter | Decoder, DrafterInfo]:
    """A drafter of the tiny primary: "tandem" or "plain" (often right), "last" (tandem on one tap, mostly wrong)."""
    key = f"{kind} {config!r}"
    if key not in _drafters:
        path = Path(_folder.name) / f"drafter-{len(_drafters)}"
        primary = tiny_primary(config)[2]
        if kind == "plain":
            make_plain_drafter(path, primary)
        else:
            make_drafter(path, primary, layer_map=None if kind == "tandem" else kind)
        _drafters[key] = (load_drafter(path).pack(), drafter_info(path, max_block_length=16))
    return _drafters[key]


def make_drafter_engine(
    kind: str = "tandem", config: DrafterEngineConfig | None = None, *, model: DecoderConfig = CONFIG, **options: object
) -> DrafterEngine:
    """A drafter engine on a tiny model. `options` go to DrafterEngine."""
    drafter, info = tiny_drafter(kind, model)
    return DrafterEngine(drafter, info, config or DrafterEngineConfig(), **options)  # type: ignore[arg-type]


def drive(engine: TorchPrimary, clock: Clock) -> None:
    """Steps until every request has finished; when nothing can be done, a second passes."""
    while engine.has_work:
        if not engine.step():
            clock.now_s += 1.0
